//! A PostgreSQL of one test's own, which may crash.

use super::script::Script;
use url::Url;

/// With the certificate and the passwords of the run's server: whoever knows that one knows this.
const SCRIPT: &str = r#"
stop() { postgres_stop "$dir" now; }
postgres_load "$(dirname "$(dirname "$KEYFERRY_TEST_POSTGRES_CA")")"
certificates=$PG_HOME
make_certificates() { cp "$certificates"/{ca.crt,server.crt,server.key} "$1"; }
postgres_start "$dir" >&2
KEYFERRY_OWNER_PASSWORD=$KEYFERRY_TEST_OWNER_PASSWORD KEYFERRY_WORKER_PASSWORD=$KEYFERRY_TEST_WORKER_PASSWORD \
    KEYFERRY_READER_PASSWORD=$KEYFERRY_TEST_READER_PASSWORD postgres_sql "$dir" -f ops/postgres/roles.sql >&2
ctl() { as_postgres "$PG_BIN/pg_ctl" -D "$PG_HOME/data" -l "$PG_HOME/postgres.log" -w -t 60 "$@" </dev/null >&2; }
# What a server leaves that was killed has to go before the next can start.
start() { ctl -o "-p $PG_PORT" start; }
echo "postgres://postgres:$PG_PASSWORD@127.0.0.1:$PG_PORT/postgres"
while read -r word; do
    case $word in
        immediate) ctl -m immediate stop ;;
        kill) kill -KILL "$(head -n1 "$PG_HOME/data/postmaster.pid")" ;;
        start) until_ok 60 start ;;
    esac
    echo "$word"
done
"#;

/// How a server ends that nobody has asked to.
#[derive(Clone, Copy, Debug)]
pub enum Crash {
    /// As where a process of it fails: it drops everything at once, and recovers when it starts.
    Immediate,
    /// The first of its processes is killed.
    Killed,
}

/// The server, stopped and removed when it is dropped.
pub struct PrivatePostgres {
    /// As the superuser.
    pub url: Url,
    script: Script,
}

impl PrivatePostgres {
    /// Starts one.
    pub async fn start() -> Self {
        let script = Script::start(SCRIPT);
        Self { url: script.line().await.parse().unwrap(), script }
    }

    /// It is gone, and nobody listens.
    pub async fn crash(&self, crash: Crash) {
        let word = match crash {
            Crash::Immediate => "immediate",
            Crash::Killed => "kill",
        };
        self.script.say(word).await;
    }

    /// Starts it again, on what it has left.
    pub async fn start_again(&self) {
        self.script.say("start").await;
    }
}
