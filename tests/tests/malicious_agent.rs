//! A VMM and an agent that a guest has taken over lie to `vmrun` in every way of `tests::liar`: it ends in time, says so in clean words,
//! needs no more memory than for an honest one, writes nowhere else, and leaves nothing. Some of each kind are told to containerd's
//! shim: containerd has an answer to each request, deletes the container, and nothing is left.

use std::fs;
use std::io::{Read as _, Seek as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, symlink};
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Resource, Rlimit, prlimit};
use tests::checks;
use tests::containerd::{Client, Containerd, Release};
use tests::liar::{Lie, OUTPUT, Scene, all};
use tests::scorecard::told;
use tests::{Outcome, Story, becomes_true};

/// Each command ends by then: the longest deadline of a call is 30 s.
const DEADLINE: Duration = Duration::from_secs(90);
/// Address space of `vmrun`, in bytes: an honest run needs a third of it.
const MOST_MEMORY: u64 = 1 << 30;
/// Bytes of standard error.
const MOST_TEXT: usize = 64 << 10;
const CONCURRENCY: usize = 24;
/// Time that a command has to end which the shim knows to run; one that is not heard of again runs on.
const PATIENCE: Duration = Duration::from_secs(2);
/// What containerd's shim is told, none of which takes a deadline to see through, and what becomes of the container.
const TOLD_TO_SHIM: [(&str, Outlook); 16] = [
    ("Configure-garbage", Outlook::Refused),
    ("CreateContainer-escapes", Outlook::Refused),
    ("CreateContainer-large-frame", Outlook::Refused),
    // A status that no protocol knows: ttrpc takes it for none.
    ("StartContainer-unknown-status", Outlook::Unknown),
    ("StartContainer-close", Outlook::Refused),
    ("exit-largest", Outlook::Ended(255)),
    ("exit-255", Outlook::Ended(255)),
    ("stream-again", Outlook::Unknown),
    ("vmm-garbage", Outlook::Unknown),
    ("vmm-escaped-reason", Outlook::Refused),
    ("vmm-wild-signal", Outlook::Refused),
    ("vmm-silent-end", Outlook::Refused),
    ("events-of-strangers", Outlook::Ended(0)),
    ("events-twice", Outlook::Ended(0)),
    ("events-lost", Outlook::Ended(0)),
    ("events-early", Outlook::Unknown),
];

/// What becomes of a container.
#[derive(Clone, Copy, Debug)]
enum Outlook {
    /// It is not created or not started.
    Refused,
    /// It ends so, and its output is whole.
    Ended(u32),
    /// One or the other.
    Unknown,
}

/// Runs `vmrun`, whose VMM is the liar, to its end and within its memory.
fn finish(story: &Story, vmm: &Path, arguments: &[&str]) -> Result<Outcome, String> {
    let [mut stdout, mut stderr] = [(); 2].map(|()| tempfile::tempfile().expect("a temporary file"));
    let mut command = story.vmrun(arguments);
    command.env("VMRUN_VMM", vmm).current_dir(story.scratch());
    command.stdout(stdout.try_clone().expect("a file")).stderr(stderr.try_clone().expect("a file"));
    let mut child = command.spawn().expect("vmrun starts");
    let limit = Rlimit { current: Some(MOST_MEMORY), maximum: Some(MOST_MEMORY) };
    // It may have ended already.
    let _ = prlimit(Some(Pid::from_child(&child)), Resource::As, limit);
    if !becomes_true(DEADLINE, || child.try_wait().expect("waited").is_some()) {
        child.kill().expect("killed");
        child.wait().expect("waited");
        return Err(format!("{arguments:?} did not end"));
    }
    let status = child.wait().expect("waited");
    let [stdout, stderr] = [&mut stdout, &mut stderr].map(|file| {
        let mut bytes = Vec::new();
        file.rewind().expect("rewound");
        file.read_to_end(&mut bytes).expect("read");
        bytes
    });
    Ok(Outcome::of(Output { status, stdout, stderr }))
}

/// What is wrong with how one command took a lie.
fn complaint(done: &Outcome) -> Result<(), String> {
    let beginning: String = done.stderr.chars().take(500).collect();
    if done.code < 0 || done.stderr.contains("panicked") {
        return Err(format!("it did not survive: {beginning}"));
    }
    if let Some(wild) = done.stderr.chars().find(|c| c.is_control() && *c != '\n') {
        return Err(format!("{wild:?} in standard error: {beginning:?}"));
    }
    if done.stderr.len() > MOST_TEXT {
        return Err(format!("{} bytes of standard error: {beginning}", done.stderr.len()));
    }
    Ok(())
}

/// Tells `vmrun` one lie; what was wrong with how it took it.
fn tell(liar: &Path, name: &str, scene: Scene, lie: Lie) -> Result<(), String> {
    let story = Story::new();
    let vmm = story.volume().join(name);
    symlink(liar, &vmm).expect("a link");
    let image = story.image();
    match scene {
        Scene::Run => {
            // A command that is not heard of again runs on, for all that is known.
            let done = finish(&story, &vmm, &["run", "--rm", "--timeout", "20s", &image, "true"])?;
            if matches!(lie, Lie::Exit(255, _)) && (done.code, done.stdout.as_str()) != (255, OUTPUT) {
                return Err(format!("an honest end is not told: {done:?}"));
            }
            complaint(&done)?;
        }
        Scene::Detached(command) => {
            let command: Vec<String> = command.iter().map(|word| word.replace("NAME", "liar")).collect();
            let command: Vec<&str> = command.iter().map(String::as_str).collect();
            let run = ["run", "-d", "--name", "liar", &image, "true"];
            let told = [&run[..], &command].map(|arguments| finish(&story, &vmm, arguments));
            // Before anything is judged: the story's end looks for what is left.
            let removed = finish(&story, &vmm, &["rm", "--force", "liar"]);
            for done in told.into_iter().chain([removed]) {
                complaint(&done?)?;
            }
        }
    }
    misplaced(&story)
}

/// What a liar's archive made elsewhere, or should not have made at all.
fn misplaced(story: &Story) -> Result<(), String> {
    let folder = story.scratch();
    let places = [PathBuf::from("/tmp/escaped-by-a-liar"), folder.join("../../escaped"), folder.join("../escaped")];
    if let Some(place) = places.into_iter().find(|place| place.exists()) {
        return Err(format!("{} was written", place.display()));
    }
    match fs::symlink_metadata(folder.join("copied")) {
        Ok(made) if made.file_type().is_char_device() || made.nlink() > 1 => {
            Err("a device or a link was made".to_owned())
        }
        _ => Ok(()),
    }
}

#[test]
fn no_lie_of_a_vmm_or_an_agent_harms_the_host() {
    let liar = Path::new(env!("CARGO_BIN_EXE_liar"));
    let lies = Mutex::new(all());
    let count = lies.lock().expect("no panic").len();
    assert_eq!(count, told("lying VMM and agent", "lies to `vmrun`"));
    let complaints = Mutex::new(Vec::new());
    let tell_all = || {
        while let Some((name, scene, lie)) = { lies.lock().expect("no panic").pop() } {
            let told = catch_unwind(|| tell(liar, &name, scene, lie));
            // What a story found left at its end is a panic.
            if let Err(complaint) = told.unwrap_or_else(|_| Err("something was left".to_owned())) {
                eprintln!("{name}: {complaint}");
                complaints.lock().expect("no panic").push(name);
            }
        }
    };
    thread::scope(|scope| {
        (0..CONCURRENCY).for_each(|_| drop(scope.spawn(tell_all)));
    });
    let complaints = complaints.into_inner().expect("no panic");
    assert!(complaints.is_empty(), "of {count} lies: {complaints:?}");
    println!("{count} lies");
}

/// Asks containerd for a container to its end; what it answers, and how the container ended.
async fn use_container(client: &Client, id: &str) -> Result<(u32, String), String> {
    let text = |status: tonic::Status| status.message().to_owned();
    let mut task = client.create(id, &["true"], |_| {}).await.map_err(text)?;
    let started = task.start().await.map_err(text);
    if started.is_ok() {
        let _ = tokio::time::timeout(PATIENCE, task.wait()).await;
    }
    // One that has ended cannot be signalled.
    let _ = task.kill(9).await;
    let waited = tokio::time::timeout(DEADLINE, task.wait()).await;
    let exit_status = waited.expect("what is killed ends").expect("its exit status is known");
    let output = task.output();
    assert_eq!(task.remove().await.expect("removed"), exit_status);
    started.map(|()| (exit_status, output))
}

/// Tells containerd one lie; what was wrong with how it took it.
fn tell_containerd(containerd: &Containerd, name: &str, outlook: Outlook) -> Result<(), String> {
    let told = containerd.block_on(use_container(&containerd.client(), name));
    println!("{name}: {told:?}");
    match (&told, outlook) {
        (Err(text), _) if text.len() > MOST_TEXT || text.contains(char::is_control) => {
            return Err(format!("{} bytes of text: {:?}", text.len(), text.chars().take(500).collect::<String>()));
        }
        (_, Outlook::Unknown) | (Err(_), Outlook::Refused) => {}
        (Ok((exit_status, output)), Outlook::Ended(code)) if *exit_status == code && output == OUTPUT => {}
        _ => return Err(format!("not {outlook:?}: {told:?}")),
    }
    let log = fs::read_to_string(containerd.log()).expect("a log");
    if log.contains("panicked") { Err("something panicked, see the log".to_owned()) } else { Ok(()) }
}

fn no_lie_harms_containerd(containerd: &mut Containerd) {
    let (drop_in, liars) = (containerd.path("etc-vmrun/config.d/liar.toml"), containerd.path("liars"));
    for folder in [drop_in.parent().expect("a folder"), &liars] {
        fs::create_dir_all(folder).expect("made");
    }
    let mut complaints = Vec::new();
    for (name, outlook) in TOLD_TO_SHIM {
        let vmm = liars.join(format!("shim-{name}"));
        symlink(env!("CARGO_BIN_EXE_liar"), &vmm).expect("a link");
        let config = format!("[artifacts]\nvmm = {vmm:?}\n[vm]\nboot_deadline_s = 20\n");
        fs::write(&drop_in, config).expect("written");
        complaints
            .extend(tell_containerd(containerd, name, outlook).err().map(|complaint| format!("{name}: {complaint}")));
        containerd.assert_idle();
        fs::remove_file(vmm).expect("removed");
    }
    fs::remove_file(drop_in).expect("removed");
    assert!(complaints.is_empty(), "{complaints:#?}");
    assert_eq!(TOLD_TO_SHIM.len(), told("lying VMM and agent", "lies to containerd's shim"));
}

#[test]
fn no_lie_of_a_vmm_or_an_agent_harms_containerd() {
    tests::containerd::tell(Release::Trixie, checks![no_lie_harms_containerd]);
}
