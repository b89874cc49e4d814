//! A server of one test's own, which a script of `ops/lib.sh` starts and stops.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex};
use tempfile::TempDir;

/// Before each script. Ends with its standard input, so that it cannot outlive a test that is killed: the server is a session
/// of its own.
const PRELUDE: &str = r"
source ops/lib.sh
dir=$1
trap stop EXIT
trap '' HUP INT TERM
";

/// A script that answers words with lines. It and what it has started end when it is dropped.
pub struct Script {
    child: Child,
    pipes: Option<Arc<Mutex<Pipes>>>,
    _directory: TempDir,
}

struct Pipes {
    words: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Script {
    /// Starts a script, which has a directory of its own in `dir` and a function `stop`.
    pub fn start(script: &str) -> Self {
        // Where a server with a root directory of its own sees it as well.
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let mut child = Command::new("setsid")
            .args(["--wait", "bash", "-c", &format!("{PRELUDE}{script}"), "script"])
            .arg(directory.path())
            .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let pipes = Pipes { words: child.stdin.take().unwrap(), answers: BufReader::new(child.stdout.take().unwrap()) };
        Self { child, pipes: Some(Arc::new(Mutex::new(pipes))), _directory: directory }
    }

    /// The next line that the script says.
    pub async fn line(&self) -> String {
        self.ask(None).await
    }

    /// Says a word; returns once the script has done as it was told.
    pub async fn say(&self, word: &'static str) {
        self.ask(Some(word)).await;
    }

    async fn ask(&self, word: Option<&'static str>) -> String {
        let pipes = Arc::clone(self.pipes.as_ref().unwrap());
        tokio::task::spawn_blocking(move || {
            let mut pipes = pipes.lock().unwrap();
            if let Some(word) = word {
                writeln!(pipes.words, "{word}").unwrap();
            }
            let mut line = String::new();
            pipes.answers.read_line(&mut line).unwrap();
            assert!(!line.is_empty(), "the script has ended");
            line.trim_end().to_owned()
        })
        .await
        .unwrap()
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        // The end of its input.
        self.pipes = None;
        drop(self.child.wait());
    }
}
