//! A RabbitMQ of one test's own, for what would befall all others: a restart, an alarm.

use super::script::Script;

/// The same RabbitMQ as that of the run.
const SCRIPT: &str = r#"
stop() { rabbitmq_stop "$dir" now; }
if [[ -n ${KEYFERRY_TEST_BROKER-} ]]; then rabbitmq_from_debian13; fi
rabbitmq_start "$dir" >&2
ctl() { rabbitmq_ctl "$dir" "$@" >&2; }
echo "$MQ_AMQP"
echo "$MQ_API"
while read -r word; do
    case $word in
        block) ctl set_vm_memory_high_watermark 0 ;;
        unblock) ctl set_vm_memory_high_watermark 0.8 ;;
        kill) kill -KILL -- "-$MQ_PID" && until_ok 10 rabbitmq_gone "$MQ_PID" ;;
        start) rabbitmq_launch "$dir" >&2 ;;
        shovels)
            echo '[rabbitmq_management, rabbitmq_auth_mechanism_ssl, rabbitmq_shovel].' >"$dir/rabbitmq/enabled_plugins"
            ctl eval 'rabbit_plugins:ensure(rabbit_plugins:enabled_plugins_file()).'
            ;;
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
    script: Script,
}

impl PrivateBroker {
    /// Starts one, which takes some seconds.
    pub async fn start() -> Self {
        let script = Script::start(SCRIPT);
        let (amqp, api) = (script.line().await, script.line().await);
        Self { amqp, api, script }
    }

    /// Makes it believe that it is short of memory, or that it no longer is.
    pub async fn block(&self, is_short: bool) {
        self.script.say(if is_short { "block" } else { "unblock" }).await;
    }

    /// Lets it run shovels, which it does not by itself.
    pub async fn enable_shovels(&self) {
        self.script.say("shovels").await;
    }

    /// Kills it: every connection is closed, and nobody listens. What it had confirmed is on disk.
    pub async fn kill(&self) {
        self.script.say("kill").await;
    }

    /// Starts it again.
    pub async fn start_again(&self) {
        self.script.say("start").await;
    }
}
