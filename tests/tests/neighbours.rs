//! A container takes of the host what it can get, one resource after another. What its VM may cost holds (`vmm/README.md`, What a guest can
//! cost the host), and a neighbour goes on; how long that takes to answer meanwhile is printed.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use tests::{Story, becomes_true, descriptors, outcome};

const DEADLINE: Duration = Duration::from_secs(120);
const WRITTEN_DEADLINE: Duration = Duration::from_secs(20);
const UNCHANGED: Duration = Duration::from_millis(500);
/// Open files that the VMM may have, of which it holds a quarter for a share.
const OPEN_FILES: usize = 4096;
/// What it has open beside.
const OTHER_FILES: usize = 100;
/// Names that the container uses: more than the VMM may hold.
const NAMES: usize = 1500;
/// Size of one file of the log, and how many there are.
const LOG: (u64, u64) = (256 << 10, 2);
/// What the container writes to it.
const FLOOD: u64 = 2 << 20;

/// A container that answers each line with itself.
struct Neighbour {
    vmrun: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Neighbour {
    fn start(story: &Story) -> Self {
        let image = story.image();
        let mut command = story.vmrun(&["run", "--rm", "-i", &image, "cat"]);
        let mut vmrun = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("vmrun starts");
        let (stdin, stdout) = (vmrun.stdin.take().expect("piped"), vmrun.stdout.take().expect("piped"));
        let mut neighbour = Self { vmrun, stdin, stdout: BufReader::new(stdout) };
        neighbour.answer();
        neighbour
    }

    /// How long it takes to answer.
    fn answer(&mut self) -> Duration {
        let asked = Instant::now();
        self.stdin.write_all(b"a line\n").expect("it reads");
        let mut line = String::new();
        self.stdout.read_line(&mut line).expect("it answers");
        assert_eq!(line, "a line\n");
        asked.elapsed()
    }

    fn end(mut self) {
        drop(self.stdin);
        assert_eq!(self.vmrun.wait().expect("wait").code(), Some(0));
    }
}

/// The container that wants more than there is.
struct Greedy<'a> {
    story: &'a Story,
    vmm: String,
    cgroup: PathBuf,
}

impl<'a> Greedy<'a> {
    const NAME: &'static str = "greedy";

    fn start(story: &'a Story) -> Self {
        let (image, volume) = (story.image(), story.volume_at_mnt());
        let (max_size, max_file) = (format!("max-size={}", LOG.0), format!("max-file={}", LOG.1));
        let options =
            ["run", "-d", "--name", Self::NAME, "--log-opt", &max_size, "--log-opt", &max_file, "-v", &volume];
        let command = ["sh", "-c", "mkfifo /tmp/log; while true; do cat /tmp/log; done"];
        let vmrun = story.vmrun(&[&options[..], &[&image], &command].concat());
        let mut limited = Command::new("prlimit");
        limited.arg(format!("--nofile=256:{OPEN_FILES}")).arg("--").arg(vmrun.get_program()).args(vmrun.get_args());
        let _ = outcome(limited).success();
        let inspected = story.inspect(Self::NAME);
        let cgroup = inspected["HostConfig"]["Cgroup"].as_str().expect("a cgroup").into();
        Self { story, vmm: inspected["State"]["Pid"].to_string(), cgroup }
    }

    /// Has a shell of the container do something while the neighbour is asked; returns what it printed.
    fn take(&self, what: &str, neighbour: &mut Neighbour, script: &str) -> String {
        let mut command = self.story.vmrun(&["exec", Self::NAME, "sh", "-c", script]);
        let mut taking = command.stdout(Stdio::piped()).spawn().expect("vmrun starts");
        let mut answers = Vec::new();
        assert!(
            becomes_true(DEADLINE, || {
                answers.push(neighbour.answer());
                taking.try_wait().expect("wait").is_some()
            }),
            "{what}"
        );
        answers.sort();
        println!(
            "{what}: the neighbour answers in {:?}, at most {:?}",
            answers[answers.len() / 2],
            answers[answers.len() - 1]
        );
        String::from_utf8(taking.wait_with_output().expect("output").stdout).expect("text")
    }

    fn of_cgroup(&self, file: &str) -> String {
        fs::read_to_string(self.cgroup.join(file)).expect("a file of the cgroup")
    }

    fn log_size(&self) -> u64 {
        let of = |folder: &Path| fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path());
        let folders = of(&self.story.data_root().join("containers")).filter(|path| path.is_dir());
        let files = folders.flat_map(|folder| of(&folder).collect::<Vec<_>>());
        let logs = files.filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().contains("log")));
        logs.map(|path| fs::metadata(path).map_or(0, |log| log.len())).sum()
    }
}

#[test]
fn a_greedy_container_gets_what_its_vm_may_cost_and_a_neighbour_goes_on() {
    let story = Story::new();
    let mut neighbour = Neighbour::start(&story);
    let greedy = Greedy::start(&story);
    greedy.take("nothing", &mut neighbour, "sleep 2");

    let made = greedy.take(
        "descriptors and inodes",
        &mut neighbour,
        &format!("exec 2>/dev/null; n=0; for i in $(seq {NAMES}); do (: >/mnt/$i) && n=$((n + 1)); done; echo $n"),
    );
    let (made, held) = (made.trim().parse::<usize>().expect("a number"), descriptors(&greedy.vmm).len());
    println!("{made} files, {held} descriptors");
    assert!((OPEN_FILES / 8..NAMES).contains(&made), "{made}");
    assert!(held <= OPEN_FILES / 4 + OTHER_FILES, "{held}");

    greedy.take(
        "names that do not exist",
        &mut neighbour,
        &format!("for i in $(seq {NAMES}); do [ -e /mnt/no-$i ]; done"),
    );
    greedy.take("memory", &mut neighbour, "tail /dev/zero");
    // For want of memory the guest has forgotten files.
    assert_eq!(story.call(&["exec", Greedy::NAME, "sh", "-c", "echo more >/mnt/1; cat /mnt/1"]).success(), "more\n");
    greedy.take(
        "processors",
        &mut neighbour,
        "for i in 1 2 3 4; do timeout 3 sh -c 'while cat /mnt/1; do :; done' >/dev/null & done; wait",
    );
    for (used, most) in [("memory.current", "memory.max"), ("pids.current", "pids.max")] {
        let [used, most] = [used, most].map(|file| greedy.of_cgroup(file).trim().parse::<u64>().expect("a number"));
        assert!(used <= most, "{used} of {most}");
    }
    assert!(greedy.of_cgroup("memory.events").contains("oom_kill 0"), "the guest was out of memory, not the host");

    greedy.take("log", &mut neighbour, &format!("yes 'a line of the log' | head -c {FLOOD} >/tmp/log"));
    // On a busy host the owner writes for a while after the container has.
    let is_written = || {
        let before = greedy.log_size();
        sleep(UNCHANGED);
        before >= LOG.0 && before == greedy.log_size()
    };
    assert!(becomes_true(WRITTEN_DEADLINE, is_written), "{} bytes", greedy.log_size());
    let log = greedy.log_size();
    // The file that is full was so by a line at most.
    assert!((LOG.0..=LOG.0 * LOG.1 + 1024).contains(&log), "{log} bytes");
    neighbour.end();
    let _ = story.call(&["rm", "--force", Greedy::NAME]).success();
}
