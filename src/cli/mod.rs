//! The command line: what a person types, what a script can trust.
//!
//! Tables for people on a terminal, `--json` for programs. Exit codes: 0 done, 1 it could not be done, 2 the
//! command line or a setting is wrong, 3 a job that was waited for did not succeed, 4 waiting took too long.

mod abandon;
mod audit;
mod cancel;
mod dead;
mod doctor;
mod events;
mod generated;
mod health;
mod hold;
mod init;
mod jobs;
mod keys;
mod kms_keys;
mod output;
mod policy;
mod publish;
mod retry;
mod sender;
mod source;
mod submit;
mod topology;

use crate::app::{self, StartError};
use crate::config::{ConfigError, DEFAULT_FILE, Loaded, Transport, place};
use crate::source::MaterialFault;
use crate::store::{self, SchemaError, StoreError};
use crate::telemetry::{Metrics, start_logs};
use anyhow::Context as _;
use clap::{Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};
use output::Output;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Carries key material into AWS KMS: reads import requests from a queue, wraps and imports the material,
/// records the result, and publishes an event.
#[derive(Debug, Parser)]
#[command(
    name = "keyferry",
    version,
    after_help = "First steps:\n  \
        keyferry init               write settings, of which a few places are to be filled in\n  \
        keyferry migrate            bring the database up to date (as its owner)\n  \
        keyferry topology apply     make queues and exchanges\n  \
        keyferry doctor             see what is wrong, and what to type\n  \
        keyferry keys create ...    make a source key\n  \
        keyferry serve              run the worker\n  \
        keyferry submit ... --wait  ask for an import and follow it\n\n\
        In an emergency:\n  \
        keyferry hold everything    stop all jobs at once; keyferry release everything\n\n\
        Settings come from keyferry.toml, each overridable by KEYFERRY_SECTION__NAME,\n\
        as in KEYFERRY_DATABASE__URL. `keyferry config show` prints them all.\n\n\
        Exit codes: 0 done; 1 could not be done; 2 command line or setting wrong;\n\
        3 a job that was waited for did not succeed; 4 waiting took too long."
)]
struct Cli {
    /// The settings file.
    #[arg(long, global = true, value_name = "FILE", env = "KEYFERRY_CONFIG")]
    config: Option<PathBuf>,
    /// Print JSON for programs instead of tables for people; errors too, as {"error": {"code", "message"}}.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the worker until SIGTERM or SIGINT.
    Serve(Serve),
    /// Bring the database schema up to date, as its owner (`database.owner_url`).
    Migrate,
    /// Publish import requests.
    Submit(Box<submit::Submit>),
    /// Look at jobs, wait for them, cancel them, do them again, give them up.
    #[command(subcommand)]
    Jobs(jobs::Jobs),
    /// Look at messages that were refused, and send them again once the cause is mended.
    Dead(dead::Dead),
    /// Publish events once more.
    #[command(subcommand)]
    Events(events::Events),
    /// Stop jobs until they are released, or list what is held.
    Hold(hold::Hold),
    /// Let go on what was held.
    Release(hold::Release),
    /// Keep the source keys of the local store.
    #[command(subcommand)]
    Keys(keys::Keys),
    /// What is in AWS, by our record: KMS keys, their materials, their last jobs.
    #[command(subcommand)]
    KmsKeys(kms_keys::KmsKeys),
    /// Look at the servers that keys come from.
    #[command(subcommand)]
    Source(source::Source),
    /// Who may ask for what: the policy file.
    #[command(subcommand)]
    Policy(policy::PolicyCommand),
    /// The queues of RabbitMQ or SQS, and RabbitMQ's exchanges, bindings and policies.
    #[command(subcommand)]
    Topology(topology::Topology),
    /// The settings.
    #[command(subcommand)]
    Config(Config),
    /// The trail of what was done.
    #[command(subcommand)]
    Audit(audit::Audit),
    /// Ask the worker on this host whether it is ready, as a container's health check does.
    Health(health::Health),
    /// Look whether everything is there that a worker needs, and say what to type where it is not.
    Doctor(doctor::Doctor),
    /// Write the first settings, a policy to begin with, and a key-encryption key.
    Init(init::Init),
    /// Print completions for a shell.
    Completions(generated::Completions),
    /// Print or write man pages.
    Man(generated::Man),
}

#[derive(Debug, Args)]
struct Serve {
    /// Bring the schema up to date first. For demonstrations: it needs the owner's rights (`database.owner_url`).
    #[arg(long)]
    migrate: bool,
}

#[derive(Debug, Subcommand)]
enum Config {
    /// Read the settings and say whether a worker could start with them. Connects nowhere.
    Check,
    /// Print the settings in force; secrets are only said to be set.
    Show,
}

/// A command's end other than success.
enum Failed {
    /// Exit code 1 or 2, with a message.
    Error(anyhow::Error),
    /// Exit code 3.
    Jobs,
    /// Exit code 4.
    Timeout,
    /// Exit code 1, everything has been said.
    Said,
}

/// Runs the command of this process's arguments.
pub fn main() -> ExitCode {
    let cli = match Cli::command().try_get_matches().and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    };
    protect_memory();
    let output = Output { json: cli.json };
    let outcome = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failed::Error(error.into()))
        .and_then(|runtime| {
            let outcome = runtime.block_on(run(cli));
            // A blocking read of standard input must not hold the process.
            runtime.shutdown_background();
            outcome
        });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failed::Jobs) => ExitCode::from(3),
        Err(Failed::Timeout) => ExitCode::from(4),
        Err(Failed::Said) => ExitCode::from(1),
        Err(Failed::Error(error)) => {
            output.error(code(&error), &error);
            ExitCode::from(if is_setting(&error) { 2 } else { 1 })
        }
    }
}

async fn run(cli: Cli) -> Result<(), Failed> {
    let (output, loaded) = (Output { json: cli.json }, Loaded::read(cli.config.as_deref()));
    let file = cli.config.unwrap_or_else(|| DEFAULT_FILE.into());
    // Those that need no settings, or look at what is wrong with them.
    let command = match cli.command {
        Command::Init(init) => return init.run(output),
        Command::Completions(completions) => return completions.run(),
        Command::Man(man) => return man.run(output),
        Command::Doctor(doctor) => return Box::pin(doctor.run(loaded, output)).await,
        command => command,
    };
    let url = if matches!(command, Command::Migrate) { "database.owner_url" } else { "database.url" };
    let done = match loaded {
        Ok(loaded) => Box::pin(with_settings(command, &loaded, output)).await,
        Err(error) => Err(error.into()),
    };
    done.map_err(|failed| failed.in_place(&file, url))
}

async fn with_settings(command: Command, loaded: &Loaded, output: Output) -> Result<(), Failed> {
    match command {
        Command::Serve(Serve { migrate }) => {
            // First of all: without a handler the signal ends the process.
            let hang_up = signal(SignalKind::hangup())?;
            let logs = start_logs(&loaded.settings.log).map_err(|_| ConfigError::Invalid {
                name: "log.filter".into(),
                expected: "a filter such as info or info,keyferry=debug",
            })?;
            if migrate {
                store::migrate(loaded.owner_url()?, &loaded.settings.database).await.context("migrating")?;
            }
            let served = Box::pin(app::serve(loaded, stop_signal()?, hang_up)).await;
            logs.end().await;
            served?;
        }
        Command::Migrate => {
            let migrated = store::migrate(loaded.owner_url()?, &loaded.settings.database).await?;
            output.value(&migrated, |migrated| match migrated.applied.as_slice() {
                [] => format!("the schema is up to date (version {})", migrated.version),
                applied => format!("applied {}; the schema is at version {}", applied.join(", "), migrated.version),
            });
        }
        Command::Submit(submit) => submit.run(loaded, output).await?,
        Command::Jobs(jobs) => jobs.run(loaded, output).await?,
        Command::Dead(dead) => Box::pin(dead.run(loaded, output)).await?,
        Command::Events(events) => events.run(loaded, output).await?,
        Command::Hold(hold) => hold.run(loaded, output).await?,
        Command::Release(release) => release.run(loaded, output).await?,
        Command::Keys(keys) => keys.run(loaded, output).await?,
        Command::KmsKeys(keys) => keys.run(loaded, output).await?,
        Command::Source(source) => source.run(loaded, output).await?,
        Command::Policy(policy) => policy.run(loaded, output)?,
        Command::Topology(topology) => topology.run(loaded, output).await?,
        Command::Config(config) => config.run(loaded, output)?,
        Command::Audit(audit) => audit.run(loaded, output).await?,
        Command::Health(health) => health.run(loaded, output).await?,
        // Done already.
        Command::Doctor(_) | Command::Init(_) | Command::Completions(_) | Command::Man(_) => {}
    }
    Ok(())
}

impl Config {
    fn run(self, loaded: &Loaded, output: Output) -> Result<(), Failed> {
        match self {
            Self::Show => output.value(&loaded.settings, |settings| {
                serde_json::to_string_pretty(settings).unwrap_or_else(|error| error.to_string())
            }),
            Self::Check => {
                let policy = loaded.policy()?;
                let mut unproved = Vec::new();
                for transport in &loaded.settings.requests_from {
                    unproved.extend(policy.unproved(transport.as_str(), &loaded.proof(*transport, &policy)?));
                }
                app::accounts(loaded)?;
                loaded.database_url()?;
                loaded.transports()?;
                if loaded.uses(Transport::RabbitMq) {
                    app::open_broker(loaded)?;
                }
                warn_of_kek_file(loaded);
                app::open_kek(loaded)?;
                app::open_dsm(loaded, &Metrics::new()?)?;
                for warning in loaded.rates()?.warnings() {
                    eprintln!("keyferry: warning: {warning}");
                }
                warn_of_open_files(loaded);
                let warnings: Vec<&String> = policy.warnings().iter().chain(&unproved).collect();
                let ok = serde_json::json!({
                    "ok": true,
                    "policy": {"digest": policy.digest(), "explanation": policy.explain(), "warnings": warnings},
                });
                output.value(&ok, |_| {
                    let unproved = unproved.iter().map(|warning| format!("warning: {warning}\n")).collect::<Vec<_>>();
                    format!("{}\n{}the settings are complete", policy::explained(&policy), unproved.concat())
                });
            }
        }
        Ok(())
    }
}

/// For commands that keep no log.
fn warn_of_kek_file(loaded: &Loaded) {
    if let Some(warning) = loaded.kek_file_warning() {
        eprintln!("keyferry: warning: {warning}");
    }
}

fn warn_of_open_files(loaded: &Loaded) {
    let files = [loaded.rabbitmq_file_warnings(), loaded.dsm_key_file_warnings(), loaded.target_file_warnings()];
    for warning in files.into_iter().flatten() {
        eprintln!("keyferry: warning: {warning}");
    }
}

/// Who is named in the audit trail: the name that the environment gives, which anybody can set, and the user id that the
/// operating system knows.
fn operator() -> String {
    let name = ["SUDO_USER", "USER", "LOGNAME"].iter().find_map(|name| std::env::var(name).ok());
    let name = name.unwrap_or_else(|| "unknown".into());
    let printable: String = crate::words::printable(&name).take(64).collect();
    format!("{printable} (uid {})", rustix::process::getuid().as_raw())
}

/// Cancelled by SIGTERM or SIGINT.
fn stop_signal() -> anyhow::Result<CancellationToken> {
    let stop = CancellationToken::new();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let told = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        told.cancel();
    });
    Ok(stop)
}

/// No core dump, no debugger: both would show key material. Best effort, and said when it fails.
fn protect_memory() {
    use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    for outcome in [setrlimit(Resource::Core, none), set_dumpable_behavior(DumpableBehavior::NotDumpable)] {
        if let Err(error) = outcome {
            eprintln!("keyferry: memory could not be protected from dumps: {error}");
        }
    }
}

/// An end with a word of its own for programs.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
struct Coded {
    code: &'static str,
    message: String,
}

/// A stable word for programs.
fn code(error: &anyhow::Error) -> &'static str {
    if let Some(fault) = error.downcast_ref::<MaterialFault>() {
        return fault.code();
    }
    match (error.downcast_ref::<Coded>(), setting(error)) {
        (Some(coded), _) => coded.code,
        (None, Some(ConfigError::Target { fault, .. })) => fault.code(),
        (None, Some(ConfigError::Quota { code, .. })) => code,
        (None, _) if matches!(error.downcast_ref(), Some(StartError::Endpoint(_))) => "aws_endpoint_http",
        (None, _) if is_setting(error) => "setting_wrong",
        (None, _) => "failed",
    }
}

fn is_setting(error: &anyhow::Error) -> bool {
    setting(error).is_some() || matches!(store_error(error), Some(StoreError::Setting { .. }))
}

fn setting(error: &anyhow::Error) -> Option<&ConfigError> {
    error.downcast_ref::<ConfigError>().or_else(|| match error.downcast_ref() {
        Some(StartError::Config(error)) => Some(error),
        _ => None,
    })
}

fn store_error(error: &anyhow::Error) -> Option<&StoreError> {
    let start = error.downcast_ref();
    if let Some(StartError::Store(error) | StartError::Schema(SchemaError::Store(error))) = start {
        return Some(error);
    }
    match error.downcast_ref() {
        Some(SchemaError::Store(error)) => Some(error),
        _ => error.downcast_ref(),
    }
}

impl Failed {
    /// Says where a setting is to be mended, for errors that know no more than its name, or only what it led to. `url` is
    /// the setting by which the command reaches Postgres.
    fn in_place(self, file: &Path, url: &str) -> Self {
        let Self::Error(error) = self else { return self };
        let context = match (setting(&error), store_error(&error)) {
            (Some(ConfigError::Invalid { name, .. }), _) => Some(format!("in {}", place(file, name))),
            (Some(ConfigError::Quota { name, .. } | ConfigError::Unusable { name, .. }), _) => {
                Some(format!("in {}", place(file, name)))
            }
            (Some(ConfigError::File { name, .. } | ConfigError::Target { name, .. }), _) => {
                Some(format!("in {}", place(file, name)))
            }
            (_, Some(StoreError::Setting { setting, .. })) => Some(format!("in {}", place(file, setting))),
            (_, Some(StoreError::Unavailable(_))) => Some(format!("by {url} in {}", place(file, url))),
            _ => None,
        };
        Self::Error(match context {
            Some(context) => error.context(context),
            None => error,
        })
    }
}

impl<E: Into<anyhow::Error>> From<E> for Failed {
    fn from(error: E) -> Self {
        Self::Error(error.into())
    }
}
