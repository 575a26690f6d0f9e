use super::*;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::thread;

const PATIENCE: Duration = Duration::from_secs(20);
/// If this variable is set, this test is the process to be stopped.
const STOPPED: &str = "CWKILL_TESTS_STOPPED";
const NAME: &str = "reclaim::ptrace::stop::tests::a_thread_that_execs_is_held_under_its_new_number";

/// A process to stop. It is not a child of the test, as an owner is not one of cwkill: waitid(2) also reports children that
/// are not traced. It is killed when this is dropped.
struct Process {
    parent: Child,
    pid: i32,
}

impl Process {
    /// A process with a thread that executes another program on request; its first thread waits.
    fn start() -> Self {
        let script = "exec 3<&0; \"$@\" <&3 >/dev/null & echo $!; wait";
        let mut parent = Command::new("sh")
            .args(["-c", script, "sh"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", NAME, "--test-threads=2"])
            .env(STOPPED, "yes")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut lines = BufReader::new(parent.stdout.take().unwrap());
        lines.read_line(&mut line).unwrap();
        let pid = line.trim().parse().unwrap();
        Process { parent, pid }
    }

    fn comms(&self) -> Vec<String> {
        let tids = ProcFs::default().tids(self.pid).unwrap_or_default();
        let comm = |tid| fs::read_to_string(format!("/proc/{tid}/comm")).ok();
        let comms = tids.into_iter().filter_map(comm);
        comms.map(|comm| comm.trim_end().to_owned()).collect()
    }

    fn wait_for(&self, condition: impl Fn(&[String]) -> bool) {
        let until = Instant::now() + PATIENCE;
        while !condition(&self.comms()) {
            assert!(Instant::now() < until, "{:?}", self.comms());
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits for the thread that will execute; returns its number.
    fn executor(&self) -> i32 {
        self.wait_for(|comms| comms.iter().any(|comm| comm == "executes"));
        let tids = ProcFs::default().tids(self.pid).unwrap();
        let is_it =
            |tid: &i32| fs::read_to_string(format!("/proc/{tid}/comm")).unwrap() == "executes\n";
        tids.into_iter().find(is_it).unwrap()
    }

    fn execute(&mut self) {
        let stdin = self.parent.stdin.as_mut().unwrap();
        stdin.write_all(b"\n").unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
        // While the test traces it, its parent does not see its end.
        let _ = self.parent.kill();
        let _ = self.parent.wait();
    }
}

fn be_stopped() {
    let execute = || {
        let _ = io::stdin().read_line(&mut String::new());
        Command::new("sleep").arg("1000").exec()
    };
    let thread = thread::Builder::new().name("executes".into());
    let error = thread.spawn(execute).unwrap().join().unwrap();
    panic!("{error}");
}

#[test]
fn a_thread_that_execs_is_held_under_its_new_number() {
    if std::env::var_os(STOPPED).is_some() {
        return be_stopped();
    }
    let proc = ProcFs::default();
    for executor_is_seized in [false, true] {
        let mut process = Process::start();
        let (pid, executor) = (process.pid, process.executor());
        let mut stopped = StoppedProcess::new(pid, PATIENCE);
        let seized = SeizedThreads::default();
        stopped.seize(&proc, pid, &seized).unwrap();
        stopped.interrupt_seized();
        let deadline = stopped.deadline;
        assert_eq!(
            stopped.threads[0].wait(deadline).unwrap(),
            ThreadState::Stopped
        );
        assert!(matches!(stopped.check_leader(&proc), Ok(Leader::Stopped)));
        if executor_is_seized {
            stopped.seize(&proc, executor, &seized).unwrap();
        }

        process.execute();
        process.wait_for(|comms| comms == ["sleep"]);
        if executor_is_seized {
            assert!(matches!(
                stopped.check_leader(&proc),
                Ok(Leader::JustStopped)
            ));
        } else {
            assert!(matches!(stopped.check_leader(&proc), Ok(Leader::Replaced)));
            assert!(stopped.threads().is_empty());
            stopped.seize(&proc, pid, &seized).unwrap();
            // A thread that cwkill has seized already is not refused.
            stopped.threads.clear();
            stopped.seize(&proc, pid, &seized).unwrap();
            stopped.interrupt_seized();
            let deadline = stopped.deadline;
            let state = stopped.threads[0].wait(deadline).unwrap();
            assert_eq!(state, ThreadState::Stopped);
        }
        assert!(matches!(stopped.check_leader(&proc), Ok(Leader::Stopped)));
        let state = || fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        assert!(state().contains(" t "), "{}", state());
        drop(stopped);
        let until = Instant::now() + PATIENCE;
        while !state().contains(" S ") {
            assert!(Instant::now() < until, "{}", state());
            thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn all_threads_are_stopped() {
    let proc = ProcFs::default();
    let process = Process::start();
    process.executor();
    let stopped =
        StoppedProcess::stop(&proc, process.pid, PATIENCE, &SeizedThreads::default()).unwrap();
    let listed = proc.tids(process.pid).unwrap();
    assert_eq!(stopped.threads().len(), listed.len());
    assert!(
        stopped
            .threads()
            .iter()
            .all(|t| t.state == ThreadState::Stopped)
    );
    assert!(stopped.elapsed() < PATIENCE);
}

#[test]
fn a_thread_whose_name_is_not_utf8_has_not_ended() {
    let root = tempfile::tempdir().unwrap();
    let task = root.path().join("7/task/8");
    fs::create_dir_all(&task).unwrap();
    let proc = ProcFs::at(root.path());
    for (stat, expected) in [
        (&b"8 (\xd0) S 1"[..], false),
        (&b"8 (\xd0) Z 1"[..], true),
        (&b"8 () Z) S 1"[..], false),
    ] {
        fs::write(task.join("stat"), stat).unwrap();
        assert_eq!(has_ended(&proc, 7, 8), expected, "{stat:?}");
    }
    assert!(has_ended(&proc, 7, 9), "not listed");
}
