//! Typed settings: one TOML file, every setting overridable by `KEYFERRY_SECTION__NAME`.

mod dsm;
mod identity;
mod intake;
mod place;
mod policy;
mod quota;
mod rates;
mod sqs;
mod target;
mod template;
mod unreadable;

pub use dsm::{DsmConnection, DsmProtocol};
pub use identity::{Identity, IdentityProof, Senders};
pub use intake::Intake;
pub use place::place;
pub use policy::PolicySource;
pub use quota::{Quota, QuotaOverride, Rate};
pub use rates::Rates;
pub use sqs::{Sqs, Transport};
pub use target::{Target, TargetFault};
pub use template::{Filled, template};

use crate::policy::{Policy, Proof};
use figment::Figment;
use figment::providers::{Env, Format as _, Serialized, Toml};
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize, Serializer};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where settings are looked for when no file is named.
pub const DEFAULT_FILE: &str = "keyferry.toml";

/// A setting, whether its value keeps to the rule, and the rule.
type Rule = (&'static str, bool, &'static str);

/// All settings. Sections that a command does not need may be missing.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Who may ask for what: a file, or `allow-all`. `serve` refuses to start without it.
    pub policy: Option<PolicySource>,
    /// What carries requests: one or both. `submit` publishes over the first.
    pub requests_from: Vec<Transport>,
    /// What carries events.
    pub events_to: Transport,
    /// Postgres.
    pub database: Database,
    /// `RabbitMQ`.
    pub rabbitmq: RabbitMq,
    /// `SQS`.
    pub sqs: Sqs,
    /// The local key store.
    pub keys: Keys,
    /// Connections to KMIP servers, by name.
    pub dsm: BTreeMap<String, DsmConnection>,
    /// Which of them is meant where a key's reference names none. The only one needs no saying.
    pub dsm_default: Option<String>,
    /// Accounts and Regions that requests may name.
    pub targets: Vec<Target>,
    /// AWS's quotas, and what part of them is Keyferry's.
    pub quota: Quota,
    /// How many jobs may wait.
    pub intake: Intake,
    /// The pool of jobs under way.
    pub worker: Worker,
    /// Health and metrics.
    pub admin: Admin,
    /// Logs.
    pub log: Log,
}

/// Postgres.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Database {
    /// `postgres://user:password@host:port/database?sslmode=require`, role `keyferry_worker`.
    #[serde(serialize_with = "redacted")]
    pub url: Option<SecretString>,
    /// The same for `migrate`, role `keyferry_owner`.
    #[serde(serialize_with = "redacted")]
    pub owner_url: Option<SecretString>,
    /// PEM file of the authority that signed the server's certificate; else the system's.
    pub ca_file: Option<PathBuf>,
    /// Largest number of connections.
    pub connections: usize,
    /// How long a statement may take.
    pub statement_timeout_ms: u64,
    /// How long a connection or a free place in the pool is waited for.
    pub connect_timeout_ms: u64,
}

/// `RabbitMQ`.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct RabbitMq {
    /// `amqp://user:password@host:port/vhost`; `amqps` for TLS. With `?auth_mechanism=external` the client certificate is
    /// the login.
    #[serde(serialize_with = "redacted")]
    pub url: Option<SecretString>,
    /// A file that holds the password of the URL's user, who has none in the URL then.
    pub password_file: Option<PathBuf>,
    /// PEM file of the authorities that sign the broker's certificate. No other is trusted; absent: the system's.
    pub ca_file: Option<PathBuf>,
    /// PEM file of a client certificate, with those between it and its authority.
    pub cert_file: Option<PathBuf>,
    /// PEM file of its private key, not encrypted.
    pub key_file: Option<PathBuf>,
    /// The name that the broker's certificate has, where it is not the URL's host.
    pub server_name: Option<String>,
    /// The management API, for `topology`: `http://user:password@host:15672`.
    #[serde(serialize_with = "redacted")]
    pub api_url: Option<SecretString>,
    /// Where requests arrive.
    pub queue: String,
    /// Where its policy dead-letters them; `dead` reads it.
    pub dead_letter_queue: String,
    /// Where events go.
    pub exchange: String,
    /// Unsettled messages in hand at most.
    pub prefetch: u16,
    /// How long a connection is waited for.
    pub connect_timeout_ms: u64,
    /// What is asked of senders.
    #[serde(flatten)]
    pub senders: Senders,
}

/// The local key store.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Keys {
    /// The key-encryption key: 32 bytes as base64 or hex. Better in a file.
    #[serde(serialize_with = "redacted")]
    pub kek: Option<SecretString>,
    /// A file that holds it.
    pub kek_file: Option<PathBuf>,
}

/// The pool of jobs under way.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Worker {
    /// Jobs under way at most.
    pub concurrency: usize,
    /// How long a claim holds without a heartbeat.
    pub lease_ms: u64,
    /// How often an idle worker looks for work that nobody announced.
    pub poll_ms: u64,
    /// How long one AWS call may take.
    pub aws_timeout_ms: u64,
    /// How long an unanswered call may still take effect: the life of its signature.
    pub signature_life_ms: u64,
    /// Whether KMS and STS may be another machine over plain http: for fakes.
    pub allow_aws_over_http: bool,
    /// How long a stopping worker waits for jobs under way and for events to be confirmed.
    pub grace_ms: u64,
}

/// Health and metrics.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Admin {
    /// Address of `/metrics`, `/livez` and `/readyz`.
    pub listen: SocketAddr,
}

/// Logs.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// A filter such as `info` or `info,keyferry=debug`.
    pub filter: String,
    /// Human lines or JSON.
    pub format: LogFormat,
}

/// How a log line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Human,
    /// For programs.
    Json,
}

/// A setting that is missing or wrong, with where to mend it.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// figment's words, without the value.
    #[error("{0}")]
    Unreadable(Box<figment::Error>),
    /// The settings file is no TOML. The line itself is not told: it may hold a password.
    #[error("{}:{line}:{column}: {problem}", file.display())]
    Syntax {
        /// The file.
        file: PathBuf,
        /// From one.
        line: usize,
        /// In characters, from one.
        column: usize,
        /// In the parser's words, which quote nothing.
        problem: String,
    },
    /// A named file does not exist.
    #[error("the settings file {} does not exist; name another with --config", .0.display())]
    NoFile(PathBuf),
    /// A setting that this command needs.
    #[error("the setting {name} is missing: write it into {} or set {variable}", file.display())]
    Missing {
        /// Dotted name.
        name: &'static str,
        /// The file that was read, or would be.
        file: PathBuf,
        /// The environment variable that sets it.
        variable: String,
    },
    /// A setting whose value breaks its rule.
    #[error("the setting {name} is wrong: expected {expected}")]
    Invalid {
        /// Dotted name.
        name: Cow<'static, str>,
        /// The rule.
        expected: &'static str,
    },
    /// A target that breaks a rule.
    #[error("the setting {name} is wrong for account {account}: expected {expected}")]
    Target {
        /// Dotted name.
        name: &'static str,
        /// Which of the targets.
        account: String,
        /// What it is.
        fault: TargetFault,
        /// The rule.
        expected: &'static str,
    },
    /// The same of a quota. Each fault has a word of its own.
    #[error("the setting {name} is wrong: expected {expected}")]
    Quota {
        /// The word.
        code: &'static str,
        /// Dotted name.
        name: String,
        /// The rule.
        expected: &'static str,
    },
    /// A file that a setting names.
    #[error("the setting {name} names {}, which cannot be read: {error}", path.display())]
    File {
        /// Dotted name.
        name: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// A file that a setting names, and that is not what it should be.
    #[error("the setting {name} names {}, which cannot be used: {reason}", path.display())]
    Unusable {
        /// Dotted name.
        name: String,
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

/// Settings and the file they came from.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The settings.
    pub settings: Settings,
    file: PathBuf,
}

impl Loaded {
    /// Reads `file`, or `keyferry.toml` if there is one, then the environment.
    pub fn read(file: Option<&Path>) -> Result<Self, ConfigError> {
        let path = match file {
            Some(path) if !path.exists() => return Err(ConfigError::NoFile(path.to_owned())),
            Some(path) => path.to_owned(),
            None => PathBuf::from(DEFAULT_FILE),
        };
        // The worker's own variables have a section; others of this prefix are not settings.
        let environment = Env::prefixed("KEYFERRY_")
            .filter(|name| {
                name.as_str().contains("__") || ["policy", "targets", "dsm_default"].iter().any(|own| name == *own)
            })
            .split("__");
        // Only the file that nobody named may be missing: then the environment says it all.
        let text = if path.exists() { Toml::file_exact(&path) } else { Toml::string("") };
        parses(&path)?;
        let figment = Figment::from(Serialized::defaults(Defaults::default())).merge(text).merge(environment);
        let settings = figment.extract().map_err(unreadable::of)?;
        let loaded = Self { settings, file: path };
        loaded.check()?;
        Ok(loaded)
    }

    /// The settings file. It need not be there: then the environment says it all.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// `database.url`.
    pub fn database_url(&self) -> Result<&str, ConfigError> {
        self.need("database.url", self.settings.database.url.as_ref())
    }

    /// `database.owner_url`.
    pub fn owner_url(&self) -> Result<&str, ConfigError> {
        self.need("database.owner_url", self.settings.database.owner_url.as_ref())
    }

    /// `rabbitmq.url`.
    pub fn amqp_url(&self) -> Result<&str, ConfigError> {
        self.need("rabbitmq.url", self.settings.rabbitmq.url.as_ref())
    }

    /// `rabbitmq.api_url`.
    pub fn rabbitmq_api_url(&self) -> Result<&str, ConfigError> {
        self.need("rabbitmq.api_url", self.settings.rabbitmq.api_url.as_ref())
    }

    /// `sqs.requests_queue_url` and `sqs.dead_letter_queue_url`.
    pub fn sqs_requests_urls(&self) -> Result<(&str, &str), ConfigError> {
        let dead_letters = self.settings.sqs.dead_letter_queue_url.as_deref();
        Ok((self.sqs_requests_url()?, dead_letters.ok_or_else(|| self.missing("sqs.dead_letter_queue_url"))?))
    }

    /// `sqs.requests_queue_url`: all that a publisher needs.
    pub fn sqs_requests_url(&self) -> Result<&str, ConfigError> {
        self.settings.sqs.requests_queue_url.as_deref().ok_or_else(|| self.missing("sqs.requests_queue_url"))
    }

    /// `sqs.events_queue_url`.
    pub fn sqs_events_url(&self) -> Result<&str, ConfigError> {
        self.settings.sqs.events_queue_url.as_deref().ok_or_else(|| self.missing("sqs.events_queue_url"))
    }

    /// Whether the transports that carry something have what they need.
    pub fn transports(&self) -> Result<(), ConfigError> {
        let Settings { requests_from, events_to, .. } = &self.settings;
        for transport in requests_from {
            match transport {
                Transport::RabbitMq => self.amqp_url().map(drop)?,
                Transport::Sqs => self.sqs_requests_urls().map(drop)?,
            }
        }
        match events_to {
            Transport::RabbitMq => self.amqp_url().map(drop),
            Transport::Sqs => self.sqs_events_url().map(drop),
        }
    }

    /// Whether requests or events go over it.
    pub fn uses(&self, transport: Transport) -> bool {
        self.settings.events_to == transport || self.settings.requests_from.contains(&transport)
    }

    /// `policy`, wherever this process runs.
    pub fn policy_source(&self) -> Result<PolicySource, ConfigError> {
        let source = self.settings.policy.clone().ok_or_else(|| self.missing("policy"))?;
        Ok(source.within(self.file.parent().unwrap_or(Path::new(""))))
    }

    /// What the file of `policy` says.
    pub fn policy(&self) -> Result<Policy, ConfigError> {
        self.policy_source()?.read()
    }

    /// What is asked of senders over a transport.
    pub fn senders(&self, transport: Transport) -> &Senders {
        match transport {
            Transport::RabbitMq => &self.settings.rabbitmq.senders,
            Transport::Sqs => &self.settings.sqs.senders,
        }
    }

    /// What senders over a transport must prove under a policy.
    pub fn proof(&self, transport: Transport, policy: &Policy) -> Result<Proof, ConfigError> {
        self.senders(transport)
            .proof(policy, identity::Names::of(transport))
            .map_err(|(name, expected)| ConfigError::Invalid { name: name.into(), expected })
    }

    /// `targets`, at least one.
    pub fn targets(&self) -> Result<&[Target], ConfigError> {
        if self.settings.targets.is_empty() { Err(self.missing("targets")) } else { Ok(&self.settings.targets) }
    }

    /// What is wrong with who may read the key-encryption key's file. No more than a warning: containers are often
    /// handed files with rights that they cannot choose.
    pub fn kek_file_warning(&self) -> Option<String> {
        let path = self.settings.keys.kek_file.as_ref()?;
        open_to_others(path).map(|mode| {
            format!(
                "the file {} of keys.kek_file is open to more than its owner (mode {mode:o}): \
                 who can read it can open every source key; chmod 600 unless something else keeps others away",
                path.display()
            )
        })
    }

    /// The same of the private keys of dsm connections.
    pub fn dsm_key_file_warnings(&self) -> Vec<String> {
        let warning = |(name, connection): (&String, &DsmConnection)| {
            let path = &connection.key_file;
            open_to_others(path).map(|mode| {
                format!(
                    "the file {} of dsm.{name}.key_file is open to more than its owner (mode {mode:o}): who can read it \
                     can fetch every key that this client may; chmod 600 unless something else keeps others away",
                    path.display()
                )
            })
        };
        self.settings.dsm.iter().filter_map(warning).collect()
    }

    /// The same of the files with which a worker is let in by `RabbitMQ`.
    pub fn rabbitmq_file_warnings(&self) -> Vec<String> {
        let RabbitMq { key_file, password_file, .. } = &self.settings.rabbitmq;
        let files = [("key_file", key_file), ("password_file", password_file)];
        let warning = |(name, path): (&str, &Option<PathBuf>)| {
            let path = path.as_ref()?;
            open_to_others(path).map(|mode| {
                format!(
                    "the file {} of rabbitmq.{name} is open to more than its owner (mode {mode:o}): who can read it can \
                     ask for what this worker may; chmod 600 unless something else keeps others away",
                    path.display()
                )
            })
        };
        files.into_iter().filter_map(warning).collect()
    }

    /// The same of a file that holds a key which signs messages.
    pub fn signing_key_warning(path: &Path) -> Option<String> {
        open_to_others(path).map(|mode| {
            format!(
                "the file {} is open to more than its owner (mode {mode:o}): who can read it can sign in its principal's \
                 name; chmod 600 unless something else keeps others away",
                path.display()
            )
        })
    }

    /// The text of the key-encryption key, from the setting or its file.
    pub fn kek(&self) -> Result<SecretString, ConfigError> {
        let keys = &self.settings.keys;
        if let Some(warning) = self.kek_file_warning() {
            tracing::warn!("{warning}");
        }
        match (&keys.kek, &keys.kek_file) {
            (Some(_), Some(_)) => {
                Err(ConfigError::Invalid { name: "keys".into(), expected: "kek or kek_file, not both" })
            }
            (Some(kek), None) => Ok(kek.clone()),
            (None, Some(path)) => std::fs::read_to_string(path)
                .map(SecretString::from)
                .map_err(|error| ConfigError::File { name: "keys.kek_file", path: path.clone(), error }),
            (None, None) => Err(self.missing("keys.kek_file")),
        }
    }

    fn need<'a>(&self, name: &'static str, value: Option<&'a SecretString>) -> Result<&'a str, ConfigError> {
        value.map(SecretString::expose_secret).filter(|text| !text.is_empty()).ok_or_else(|| self.missing(name))
    }

    fn missing(&self, name: &'static str) -> ConfigError {
        ConfigError::Missing { name, file: self.file.clone(), variable: place::variable(name) }
    }

    fn check(&self) -> Result<(), ConfigError> {
        let Settings { requests_from, worker, database, rabbitmq, sqs, targets, dsm, dsm_default, intake, .. } =
            &self.settings;
        // AMQP carries no longer name.
        let is_name = |name: &str| (1..=255).contains(&name.len());
        let is_twice = requests_from.len() == 2 && requests_from[0] == requests_from[1];
        let rules: [Rule; 12] = [
            ("requests_from", (1..=2).contains(&requests_from.len()) && !is_twice, "rabbitmq, sqs, or both, each once"),
            ("worker.concurrency", (1..=1024).contains(&worker.concurrency), "1 to 1024"),
            ("worker.aws_timeout_ms", (100..=60_000).contains(&worker.aws_timeout_ms), "100 to 60000"),
            (
                "worker.lease_ms",
                worker.lease_ms >= 3 * worker.aws_timeout_ms,
                "at least three times worker.aws_timeout_ms: a call is only made when its answer falls into the lease",
            ),
            ("worker.poll_ms", (10..=60_000).contains(&worker.poll_ms), "10 to 60000"),
            ("database.connections", (2..=200).contains(&database.connections), "2 to 200"),
            ("rabbitmq.queue", is_name(&rabbitmq.queue), "a name of 1 to 255 bytes"),
            ("rabbitmq.dead_letter_queue", is_name(&rabbitmq.dead_letter_queue), "a name of 1 to 255 bytes"),
            ("rabbitmq.exchange", is_name(&rabbitmq.exchange), "a name of 1 to 255 bytes"),
            ("rabbitmq.prefetch", rabbitmq.prefetch >= 1, "1 to 65535"),
            (
                "targets.account",
                targets
                    .iter()
                    .all(|target| target.account.len() == 12 && target.account.bytes().all(|b| b.is_ascii_digit())),
                "12 digits",
            ),
            ("targets.regions", targets.iter().all(|target| !target.regions.is_empty()), "at least one Region"),
        ];
        match rules.into_iter().chain(sqs.rules()).chain(intake.rules()).find(|(_, holds, _)| !holds) {
            Some((name, _, expected)) => Err(ConfigError::Invalid { name: name.into(), expected }),
            None => match dsm::broken_rule(dsm, dsm_default.as_deref()) {
                Some((name, expected)) => Err(ConfigError::Invalid { name: name.into(), expected }),
                None => match target::broken_rule(targets) {
                    Some(error) => Err(error),
                    None => self.settings.quota.check(targets),
                },
            },
        }
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            policy: None,
            requests_from: vec![Transport::RabbitMq],
            events_to: Transport::RabbitMq,
            database: Database::default(),
            rabbitmq: RabbitMq::default(),
            sqs: Sqs::default(),
            keys: Keys::default(),
            dsm: BTreeMap::new(),
            dsm_default: None,
            targets: Vec::new(),
            quota: Quota::default(),
            intake: Intake::default(),
            worker: Worker::default(),
            admin: Admin::default(),
            log: Log::default(),
        }
    }
}

impl Default for Database {
    fn default() -> Self {
        Self {
            url: None,
            owner_url: None,
            ca_file: None,
            connections: 8,
            statement_timeout_ms: 10_000,
            connect_timeout_ms: 5_000,
        }
    }
}

impl Default for RabbitMq {
    fn default() -> Self {
        Self {
            url: None,
            password_file: None,
            ca_file: None,
            cert_file: None,
            key_file: None,
            server_name: None,
            api_url: None,
            queue: "keyferry.jobs".into(),
            dead_letter_queue: "keyferry.dead".into(),
            exchange: "keyferry.events".into(),
            prefetch: 400,
            connect_timeout_ms: 10_000,
            senders: Senders::default(),
        }
    }
}

impl Default for Worker {
    fn default() -> Self {
        Self {
            concurrency: 64,
            lease_ms: 30_000,
            poll_ms: 500,
            aws_timeout_ms: 5_000,
            signature_life_ms: 600_000,
            allow_aws_over_http: false,
            grace_ms: 20_000,
        }
    }
}

impl Worker {
    /// `lease_ms`.
    pub fn lease(&self) -> Duration {
        Duration::from_millis(self.lease_ms)
    }

    /// `aws_timeout_ms`.
    pub fn aws_timeout(&self) -> Duration {
        Duration::from_millis(self.aws_timeout_ms)
    }

    /// `signature_life_ms`.
    pub fn signature_life(&self) -> Duration {
        Duration::from_millis(self.signature_life_ms)
    }

    /// `grace_ms`.
    pub fn grace(&self) -> Duration {
        Duration::from_millis(self.grace_ms)
    }
}

impl Default for Admin {
    fn default() -> Self {
        Self { listen: SocketAddr::from(([127, 0, 0, 1], 9464)) }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self { filter: "info".into(), format: LogFormat::Human }
    }
}

/// The rights of a file that more than its owner has.
fn open_to_others(path: &Path) -> Option<u32> {
    use std::os::unix::fs::PermissionsExt as _;
    let mode = std::fs::metadata(path).ok()?.permissions().mode() & 0o777;
    (mode & 0o077 != 0).then_some(mode)
}

/// Nothing: every section brings its own defaults. Figment wants a base to name in its errors.
#[derive(Default, Serialize)]
struct Defaults {}

/// Shows that a secret is set, never what it is.
#[expect(clippy::ref_option, reason = "serde hands the field over so")]
fn redacted<S: Serializer>(secret: &Option<SecretString>, serializer: S) -> Result<S::Ok, S::Error> {
    secret.as_ref().map(|_| "(set)").serialize(serializer)
}

/// Whether the file is TOML, if it can be read at all: what cannot is for figment to tell.
fn parses(file: &Path) -> Result<(), ConfigError> {
    let Ok(text) = std::fs::read_to_string(file) else { return Ok(()) };
    let Err(error) = toml::from_str::<toml::Table>(&text) else { return Ok(()) };
    let before = text.get(..error.span().unwrap_or_default().start).unwrap_or_default();
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
    Err(ConfigError::Syntax { file: file.to_owned(), line, column, problem: error.message().to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Loaded, ConfigError> {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("k.toml");
        std::fs::write(&file, text).unwrap();
        Loaded::read(Some(&file))
    }

    #[test]
    fn a_small_file_is_enough() {
        let loaded = read(
            r#"
            policy = "allow-all"
            [database]
            url = "postgres://u:secret@h/d"
            [[targets]]
            account = "111122223333"
            regions = ["eu-central-1"]
            "#,
        )
        .unwrap();
        assert!(matches!(loaded.policy().unwrap(), Policy::AllowAll));
        assert_eq!(loaded.settings.worker.concurrency, 64);
        assert!(!format!("{loaded:?}").contains("secret"));
        assert!(!serde_json::to_string(&loaded.settings).unwrap().contains("secret"));
        let error = loaded.amqp_url().unwrap_err().to_string();
        assert!(error.contains("rabbitmq.url") && error.contains("KEYFERRY_RABBITMQ__URL"), "{error}");
    }

    #[test]
    fn a_file_of_the_key_encryption_key_is_for_its_owner_alone() {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("kek");
        std::fs::write(&file, "00".repeat(32)).unwrap();
        let mut loaded = read("").unwrap();
        loaded.settings.keys.kek_file = Some(file.clone());
        for (mode, is_warned) in [(0o600, false), (0o400, false), (0o640, true), (0o604, true), (0o660, true)] {
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(loaded.kek_file_warning().is_some(), is_warned, "{mode:o}");
            assert!(loaded.kek().is_ok(), "{mode:o}");
        }
    }

    #[test]
    #[expect(clippy::result_large_err, reason = "figment's jail wants figment's error")]
    fn without_a_file_the_environment_says_it_all() {
        figment::Jail::expect_with(|jail| {
            jail.set_env("KEYFERRY_POLICY", "allow-all");
            jail.set_env("KEYFERRY_DATABASE__URL", "postgres://u@h/d");
            jail.set_env("KEYFERRY_WORKER__CONCURRENCY", "7");
            jail.set_env("KEYFERRY_TARGETS", r#"[{account="111122223333",regions=["eu-central-1"]}]"#);
            let loaded = Loaded::read(None).map_err(|error| error.to_string())?;
            assert!(matches!(loaded.policy().unwrap(), Policy::AllowAll));
            assert_eq!(loaded.database_url().unwrap(), "postgres://u@h/d");
            assert_eq!(loaded.settings.worker.concurrency, 7);
            assert_eq!(loaded.targets().unwrap()[0].account, "111122223333");
            assert!(matches!(Loaded::read(Some(Path::new("other.toml"))), Err(ConfigError::NoFile(_))));
            Ok(())
        });
    }

    #[test]
    #[expect(clippy::result_large_err, reason = "figment's jail wants figment's error")]
    fn a_line_that_is_no_toml_is_named_and_not_quoted() {
        figment::Jail::expect_with(|jail| {
            jail.create_file("broken.toml", "[database]\nurl = \"postgres://u:hush@h/d\nx = 1\n")?;
            let error = Loaded::read(Some(Path::new("broken.toml"))).err().map(|error| error.to_string()).unwrap();
            assert!(error.starts_with("broken.toml:2:") && !error.contains("hush"), "{error}");
            Ok(())
        });
    }

    fn dsm(name: &str, further: &str) -> String {
        format!(
            "[dsm.{name}]\nservers = [\"h:5696\"]\nca_file = \"ca\"\ncert_file = \"cert\"\nkey_file = \"key\"\n{further}"
        )
    }

    #[test]
    fn a_dsm_connection_is_read() {
        let loaded = read(&dsm("prod-eu", "protocol = \"1.4\"")).unwrap();
        let connection = &loaded.settings.dsm["prod-eu"];
        assert_eq!((connection.protocol, connection.max_connections), (DsmProtocol::V1_4, 4));
        assert_eq!(read(&dsm("a", "protocol = 2.0")).unwrap().settings.dsm["a"].protocol, DsmProtocol::V2_0);
        assert_eq!(read(&dsm("a", "")).unwrap().settings.dsm["a"].protocol, DsmProtocol::Auto);
    }

    #[test]
    fn each_transport_needs_its_own_settings_and_no_others() {
        let url = |name: &str| format!("https://sqs.eu-central-1.amazonaws.com/111122223333/{name}");
        let missing = |text: &str| read(text).unwrap().transports().map_err(|error| error.to_string());
        let amqp = "[rabbitmq]\nurl = \"amqp://h\"\n";
        let requests = format!("requests_queue_url = \"{}\"\n", url("r"));
        let dead = format!("dead_letter_queue_url = \"{}\"\n", url("d"));
        let events = format!("events_queue_url = \"{}\"\n", url("e"));
        let (both, sqs) =
            ("requests_from = [\"sqs\", \"rabbitmq\"]\n", "requests_from = [\"sqs\"]\nevents_to = \"sqs\"\n");
        assert!(missing("").unwrap_err().contains("rabbitmq.url"));
        assert!(missing(amqp).is_ok());
        assert!(
            missing(&format!("{sqs}{amqp}[sqs]\n{events}")).unwrap_err().contains("KEYFERRY_SQS__REQUESTS_QUEUE_URL")
        );
        assert!(missing(&format!("{sqs}[sqs]\n{requests}{events}")).unwrap_err().contains("sqs.dead_letter_queue_url"));
        assert!(missing(&format!("{sqs}[sqs]\n{requests}{dead}")).unwrap_err().contains("sqs.events_queue_url"));
        assert!(missing(&format!("{sqs}[sqs]\n{requests}{dead}{events}")).is_ok());
        assert!(missing(&format!("{both}[sqs]\n{requests}{dead}")).unwrap_err().contains("rabbitmq.url"));
        let loaded = read(&format!("{both}{amqp}[sqs]\n{requests}{dead}")).unwrap();
        assert!(loaded.transports().is_ok() && loaded.uses(Transport::Sqs) && loaded.uses(Transport::RabbitMq));
        assert_eq!(loaded.settings.requests_from, [Transport::Sqs, Transport::RabbitMq]);
        assert!(!read(sqs).unwrap().uses(Transport::RabbitMq));
    }

    #[test]
    fn a_wrong_setting_is_named() {
        for (text, named) in [
            ("colour = 1", "colour"),
            ("[worker]\nconcurrency = \"many\"", "concurrency"),
            ("[worker]\nconcurrency = 0", "worker.concurrency"),
            ("[worker]\nlease_ms = 1000", "worker.lease_ms"),
            ("policy = 1", "policy"),
            ("[rabbitmq]\nidentity = \"perhaps\"", "identity"),
            ("[rabbitmq]\nidentity_proof = \"word\"", "identity_proof"),
            ("[rabbitmq]\ncolour = 1", "colour"),
            ("[rabbitmq]\nqueue = \"\"", "rabbitmq.queue"),
            ("[[targets]]\naccount = \"1\"\nregions = [\"r\"]", "targets.account"),
            ("requests_from = []", "requests_from"),
            ("requests_from = [\"sqs\", \"sqs\"]", "requests_from"),
            ("requests_from = [\"kafka\"]", "requests_from"),
            ("events_to = \"kafka\"", "events_to"),
            ("[sqs]\nrequests_queue_url = \"jobs\"", "sqs.requests_queue_url"),
            (
                "[sqs]\nrequests_queue_url = \"https://h/1/a\"\ndead_letter_queue_url = \"https://h/1/a\"",
                "sqs.dead_letter_queue_url",
            ),
            ("[sqs]\npollers = 0", "sqs.pollers"),
            ("[sqs]\nwait_s = 21", "sqs.wait_s"),
            ("[sqs]\nvisibility_timeout_s = 4", "sqs.visibility_timeout_s"),
            ("[sqs]\npollers = 2\nin_hand = 19", "sqs.in_hand"),
            ("[intake]\nmax_waiting_per_key = 0", "intake.max_waiting_per_key"),
            ("[intake]\npause_above = 5\nresume_below = 6", "intake.resume_below"),
            ("dsm_default = \"a\"", "dsm_default"),
            ("[dsm.a]\nservers = [\"h\"]", "ca_file"),
            (&dsm("A", ""), "dsm.A"),
            (&dsm("a", "protocol = \"1.1\""), "1.4"),
            (&dsm("a", "max_connections = 0"), "dsm.a.max_connections"),
            (&dsm("a", "request_timeout_ms = 1"), "dsm.a.request_timeout_ms"),
            (&dsm("a", "").replace("h:5696", "h:x"), "dsm.a.servers"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(named), "{text}: {error}");
        }
    }
}
