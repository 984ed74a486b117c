//! Answers, or asks who answers: the program of `tests::echo`, for hosts, namespaces and guests.

fn main() {
    tests::echo::run();
}
