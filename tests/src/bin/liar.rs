//! Stands in for `vmm`: a VMM and an agent that lie. Which lie is the name that it was called by. See `tests::liar`.

fn main() {
    tests::liar::serve();
}
