//! Child processes: started clean, logged to a file, never left behind.

use rustix::process::{Pid, Signal, kill_process};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// A child process, killed when it is dropped.
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts a command with an environment of its own and standard error in a file.
    pub fn start(command: &mut Command, log: PathBuf) -> Self {
        let file = std::fs::OpenOptions::new().create(true).append(true).open(&log).unwrap();
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .spawn()
            .unwrap_or_else(|error| panic!("{} does not start: {error}", command.get_program().display()));
        Self { child, log }
    }

    /// All that it has written.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// The port on which it listens at 127.0.0.1, as the kernel knows it.
    pub fn listens_on(&self) -> Option<u16> {
        let own = std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).ok()?;
        let own: Vec<PathBuf> = own.flatten().filter_map(|entry| std::fs::read_link(entry.path()).ok()).collect();
        let sockets = std::fs::read_to_string("/proc/net/tcp").ok()?;
        sockets.lines().skip(1).find_map(|line| {
            // Place, own address, the other's, state, queues, timer, retransmissions, user, time-out, inode (proc(5)).
            let fields: Vec<&str> = line.split_whitespace().collect();
            let (address, port) = fields[1].split_once(':')?;
            let socket = PathBuf::from(format!("socket:[{}]", fields[9]));
            let listens = fields[3] == "0A" && address == "0100007F" && own.contains(&socket);
            u16::from_str_radix(port, 16).ok().filter(|_| listens)
        })
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Waits for its end.
    pub async fn wait(&mut self, most: Duration) -> ExitStatus {
        let end = Instant::now() + most;
        loop {
            if let Some(status) = self.ended() {
                return status;
            }
            assert!(Instant::now() < end, "the process did not end within {most:?}:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Ends it by force, as a machine that loses power would.
    pub fn kill(&mut self) {
        // It may have ended by itself.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}
