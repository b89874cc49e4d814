//! A RabbitMQ of one test's own, for what would befall all others: a restart, an alarm.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex};
use tempfile::TempDir;

/// Ends with its standard input, so that it cannot outlive a test that is killed: the broker is a session of its own.
const SCRIPT: &str = r#"
source ops/lib.sh
dir=$1
trap 'rabbitmq_stop "$dir" now' EXIT
trap '' HUP INT TERM
rabbitmq_start "$dir" >&2
ctl() {
    HOME=$dir/rabbitmq/home RABBITMQ_NODENAME=kf$MQ_PORT@localhost ERL_EPMD_PORT=$MQ_EPMD_PORT \
        RABBITMQ_CONF_ENV_FILE=/dev/null /usr/lib/rabbitmq/bin/rabbitmqctl "$@" >&2
}
echo "$MQ_AMQP"
echo "$MQ_API"
while read -r word; do
    case $word in
        block) ctl set_vm_memory_high_watermark 0 ;;
        unblock) ctl set_vm_memory_high_watermark 0.8 ;;
        stop) ctl stop_app ;;
        start) ctl start_app && until_ok 60 rabbitmq_ready "$dir" ;;
    esac
    echo "$word"
done
"#;

/// The broker, stopped and removed when it is dropped.
pub struct PrivateBroker {
    /// Its URL without a virtual host.
    pub amqp: String,
    /// Its management API.
    pub api: String,
    child: Child,
    pipes: Option<Arc<Mutex<Pipes>>>,
    _directory: TempDir,
}

struct Pipes {
    words: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl PrivateBroker {
    /// Starts one, which takes some seconds.
    pub async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut child = Command::new("setsid")
            .args(["--wait", "bash", "-c", SCRIPT, "broker"])
            .arg(directory.path())
            .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let pipes = Pipes { words: child.stdin.take().unwrap(), answers: BufReader::new(child.stdout.take().unwrap()) };
        let pipes = Arc::new(Mutex::new(pipes));
        let mut broker =
            Self { amqp: String::new(), api: String::new(), child, pipes: Some(pipes), _directory: directory };
        broker.amqp = broker.ask(None).await;
        broker.api = broker.ask(None).await;
        broker
    }

    /// Makes it believe that it is short of memory, or that it no longer is.
    pub async fn block(&self, is_short: bool) {
        self.ask(Some(if is_short { "block" } else { "unblock" })).await;
    }

    /// Stops the broker as for a restart: every connection is closed, and nobody listens.
    pub async fn stop(&self) {
        self.ask(Some("stop")).await;
    }

    /// Starts it again.
    pub async fn start_again(&self) {
        self.ask(Some("start")).await;
    }

    /// The next line that the script says, after a word to it.
    async fn ask(&self, word: Option<&'static str>) -> String {
        let pipes = Arc::clone(self.pipes.as_ref().unwrap());
        tokio::task::spawn_blocking(move || {
            let mut pipes = pipes.lock().unwrap();
            if let Some(word) = word {
                writeln!(pipes.words, "{word}").unwrap();
            }
            let mut line = String::new();
            pipes.answers.read_line(&mut line).unwrap();
            assert!(!line.is_empty(), "the broker's script has ended");
            line.trim_end().to_owned()
        })
        .await
        .unwrap()
    }
}

impl Drop for PrivateBroker {
    fn drop(&mut self) {
        // The end of its input.
        self.pipes = None;
        drop(self.child.wait());
    }
}
