//! Composition: settings in, a running worker out, and its orderly end.

mod reload;

use crate::amqp::Broker;
use crate::config::{self, ConfigError, Intake as IntakeSettings, Loaded, Rates, Target, Transport};
use crate::ingress::Ingress;
use crate::ingress::rabbitmq::Queue;
use crate::ingress::sqs::Source;
use crate::intake::{Fuse, Intake, Limits, Marks, Watch};
use crate::job::Scarce;
use crate::kms::{Account, Encryption, Kms, PlainEndpoint, Role};
use crate::outbox::rabbitmq::Exchange;
use crate::outbox::sqs::Events;
use crate::outbox::{Destination, Relay};
use crate::policy::{Current, Policy, Proof, Targets};
use crate::source::{Dsm, Kek, KekError, Keyring};
use crate::sqs::Sqs;
use crate::store::{QuotaLane, SchemaError, Store, StoreError};
use crate::telemetry::{Health, Metrics, Part, serve_admin};
use crate::worker::{self, Context, Meters};
use reload::Reload;
use secrecy::ExposeSecret as _;
use std::collections::HashMap;
use std::sync::{Arc, Once};
use std::time::Duration;
use tokio::signal::unix::Signal;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

/// What jobs may take beyond the grace time and a call to AWS, to be given back and written. The end of a session with a
/// broker that does not answer fits in as well.
const LAST_WRITES: Duration = Duration::from_secs(15);
/// For events where all else took its whole time.
const LAST_EVENTS: Duration = Duration::from_secs(5);

/// Why the worker did not start, or did not go on.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A setting.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Postgres.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The schema.
    #[error(transparent)]
    Schema(#[from] SchemaError),
    /// The key-encryption key.
    #[error(transparent)]
    Kek(#[from] KekError),
    /// Metrics.
    #[error("metrics cannot be registered: {0}")]
    Metrics(#[from] prometheus::Error),
    /// An endpoint of AWS's.
    #[error(transparent)]
    Endpoint(#[from] PlainEndpoint),
    /// A part ended without being told to.
    #[error("a part of the worker broke off, by a fault of Keyferry's own; the log says where: start it again")]
    Broken,
    /// The admin port.
    #[error("the address admin.listen = {address} cannot be bound: {error}")]
    Admin {
        /// The setting.
        address: std::net::SocketAddr,
        /// Why.
        error: std::io::Error,
    },
}

async fn open_kms(loaded: &Loaded, metrics: &Metrics) -> Result<Kms, StartError> {
    let worker = &loaded.settings.worker;
    let kms = Kms::connect(accounts(loaded)?, worker.aws_timeout(), encryption(worker), metrics).await?;
    kms.warm();
    Ok(kms)
}

/// Whether calls of KMS and STS must be encrypted wherever they go.
pub fn encryption(settings: &config::Worker) -> Encryption {
    if settings.allow_aws_over_http { Encryption::Optional } else { Encryption::Required }
}

/// The store, with a schema that fits.
pub async fn open_store(loaded: &Loaded) -> Result<Store, StartError> {
    let store = Store::new(loaded.database_url()?, &loaded.settings.database)?;
    store.check_schema().await?;
    Ok(store)
}

/// The key-encryption key of the settings.
pub fn open_kek(loaded: &Loaded) -> Result<Kek, ConfigError> {
    Kek::parse(loaded.kek()?.expose_secret()).map_err(|error| match &loaded.settings.keys.kek_file {
        Some(path) => {
            ConfigError::Unusable { name: "keys.kek_file".into(), path: path.clone(), reason: error.to_string() }
        }
        None => ConfigError::Invalid {
            name: "keys.kek".into(),
            expected: "32 bytes as base64 or 64 hex digits; make them with: openssl rand -base64 32",
        },
    })
}

/// The keys of the local tier; refuses a key-encryption key that did not seal this store.
pub async fn open_keyring(loaded: &Loaded, store: &Store) -> Result<Keyring, StartError> {
    let kek = open_kek(loaded)?;
    let first = Keyring::new_fingerprint_key(&kek)?;
    let stored = store.fingerprint_key(&first).await?;
    Ok(Keyring::open(kek, &stored)?)
}

/// The broker of the settings. Reads the files that they name, connects nowhere.
pub fn open_broker(loaded: &Loaded) -> Result<Broker, ConfigError> {
    for warning in loaded.rabbitmq_file_warnings() {
        tracing::warn!("{warning}");
    }
    Broker::new(&loaded.settings.rabbitmq, loaded.amqp_url()?)
}

/// The connections of the dsm tier. Reads their files, connects nowhere; without any, the tier is not configured.
pub fn open_dsm(loaded: &Loaded, metrics: &Metrics) -> Result<Dsm, StartError> {
    for warning in loaded.dsm_key_file_warnings() {
        tracing::warn!("{warning}");
    }
    Ok(Dsm::new(&loaded.settings.dsm, loaded.settings.dsm_default.as_deref(), metrics)?)
}

/// Runs the worker until `stop`, then ends it in order: intake, jobs under way, events, and the rest. At each `hang_up` the
/// policy's file is read again.
pub async fn serve(loaded: &Loaded, stop: CancellationToken, hang_up: Signal) -> Result<(), StartError> {
    let settings = &loaded.settings;
    // Everything that can be wrong is found before the first message is taken.
    let policy = loaded.policy()?;
    let proofs = proofs(loaded, &policy)?;
    let targets = targets(loaded)?;
    loaded.transports()?;
    let broker = if loaded.uses(Transport::RabbitMq) { Some(open_broker(loaded)?) } else { None };
    let store = open_store(loaded).await?;
    let keyring = Arc::new(open_keyring(loaded, &store).await?);
    let metrics = Metrics::new()?;
    let store = store.counted_by(&metrics);
    let rates = govern(loaded, &store).await?;
    let dsm = Arc::new(open_dsm(loaded, &metrics)?);
    let (reload, policy) = Reload::start(loaded.policy_source()?, policy, store.clone(), metrics.clone()).await?;
    let ingresses = settings.requests_from.iter().map(|transport| part(*transport));
    let health = Health::of(&[Part::Store].into_iter().chain(ingresses).chain([Part::Events]).collect::<Vec<_>>());
    health.set(Part::Store, true);
    let (jobs, events) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    for warning in loaded.target_file_warnings() {
        tracing::warn!("{warning}");
    }
    let kms = open_kms(loaded, &metrics).await?;

    let finished = CancellationToken::new();
    let (address, admin) = serve_admin(settings.admin.listen, metrics.clone(), health.clone(), finished.clone())
        .await
        .map_err(|error| StartError::Admin { address: settings.admin.listen, error })?;
    let admin = tokio::spawn(admin);
    tracing::info!(admin.address = %address, jobs.concurrency = settings.worker.concurrency, "starting");

    let (watch, fuse) = Watch::start(store.clone(), marks(&settings.intake)).await?;
    let common = Common {
        limits: limits(&settings.intake),
        fuse,
        store: store.clone(),
        keyring: Arc::clone(&keyring),
        policy: policy.clone(),
        proofs,
        targets: targets.clone(),
        dsm: Arc::clone(&dsm),
        metrics: metrics.clone(),
        health: health.clone(),
        jobs: Arc::clone(&jobs),
        events: Arc::clone(&events),
    };
    let links = links(loaded, broker, &metrics).await?;
    let context = Context {
        store,
        kms,
        keyring,
        dsm,
        policy,
        targets,
        settings: settings.worker.clone(),
        rates,
        meters: Meters::of(&metrics),
        metrics,
        health,
        jobs,
        events,
    };
    let drain = CancellationToken::new();
    let (mut parts, mut relays) = (JoinSet::new(), JoinSet::new());
    match links.events {
        EventLink::RabbitMq(exchange) => spawn_relay(exchange, &common, &drain, &mut relays),
        EventLink::Sqs(queue) => spawn_relay(queue, &common, &drain, &mut relays),
    }
    if let Some(queue) = links.rabbitmq {
        spawn_intake(queue, Part::RabbitMq, &common, &stop, &mut parts);
    }
    if let Some(source) = links.sqs {
        spawn_intake(source, Part::Sqs, &common, &stop, &mut parts);
    }
    drop(common);
    parts.spawn(worker::run(Arc::new(context), stop.clone()));
    parts.spawn(watch.run(stop.clone()));
    let stopping = stop.clone();
    parts.spawn(async move { reload.run(hang_up, stopping).await });

    let is_broken = tokio::select! {
        biased;
        () = stop.cancelled() => false,
        // No part ends by itself. Half a worker would only look alive.
        _ = parts.join_next() => !stop.is_cancelled(),
        _ = relays.join_next() => !stop.is_cancelled(),
    };
    stop.cancel();
    tracing::info!("stopping: no more messages are taken");
    // One grace time for all: what comes last does not begin to count anew.
    let grace = Instant::now() + settings.worker.grace();
    let writes = grace + settings.worker.aws_timeout() + LAST_WRITES;
    if timeout_at(writes, async { while parts.join_next().await.is_some() {} }).await.is_err() {
        tracing::warn!("the grace time is over: what is in hand is left to its leases and visibility timeouts");
        parts.abort_all();
    }
    drain.cancel();
    if timeout_at(grace.max(Instant::now() + LAST_EVENTS), relays.join_next()).await.is_err() {
        tracing::warn!("the grace time is over: events are left in the outbox for the next start");
    }
    drop(relays);
    finished.cancel();
    drop(tokio::time::timeout(Duration::from_secs(2), admin).await);
    if is_broken { Err(StartError::Broken) } else { Ok(()) }
}

/// What every intake and the relay work with.
struct Common {
    limits: Limits,
    fuse: Fuse,
    store: Store,
    keyring: Arc<Keyring>,
    policy: Current,
    /// By transport.
    proofs: HashMap<&'static str, Proof>,
    targets: Targets,
    dsm: Arc<Dsm>,
    metrics: Metrics,
    health: Health,
    jobs: Arc<Notify>,
    events: Arc<Notify>,
}

/// Both ends of the transports that the settings name.
struct Links {
    rabbitmq: Option<Queue>,
    sqs: Option<Source>,
    events: EventLink,
}

enum EventLink {
    RabbitMq(Exchange),
    Sqs(Events),
}

/// Connects nowhere. A broker where the settings use `RabbitMQ`.
async fn links(loaded: &Loaded, broker: Option<Broker>, metrics: &Metrics) -> Result<Links, ConfigError> {
    let settings = &loaded.settings;
    let client = if loaded.uses(Transport::Sqs) {
        Some(Sqs::connect(settings.sqs.region.as_deref(), metrics).await)
    } else {
        None
    };
    let events = match (&broker, &client) {
        (Some(broker), _) if settings.events_to == Transport::RabbitMq => {
            EventLink::RabbitMq(Exchange::new(broker.clone(), settings.rabbitmq.exchange.clone()))
        }
        (_, Some(client)) => EventLink::Sqs(Events { queue: client.queue(loaded.sqs_events_url()?) }),
        (_, None) => {
            return Err(ConfigError::Invalid { name: "events_to".into(), expected: "a transport with settings" });
        }
    };
    let requests_from = |transport| settings.requests_from.contains(&transport);
    let rabbitmq = broker.filter(|_| requests_from(Transport::RabbitMq)).map(|broker| Queue {
        broker,
        name: settings.rabbitmq.queue.clone(),
        prefetch: settings.rabbitmq.prefetch,
    });
    let sqs = match client.filter(|_| requests_from(Transport::Sqs)) {
        None => None,
        Some(client) => {
            let (requests, dead_letters) = loaded.sqs_requests_urls()?;
            Some(Source {
                requests: client.queue(requests),
                dead_letters: client.queue(dead_letters),
                pollers: settings.sqs.pollers,
                wait: settings.sqs.wait(),
                visibility: settings.sqs.visibility(),
                in_hand: settings.sqs.in_hand,
                metrics: metrics.clone(),
                told: Once::new(),
            })
        }
    };
    Ok(Links { rabbitmq, sqs, events })
}

fn part(transport: Transport) -> Part {
    match transport {
        Transport::RabbitMq => Part::RabbitMq,
        Transport::Sqs => Part::Sqs,
    }
}

fn spawn_intake<I: Ingress + 'static>(
    ingress: I,
    part: Part,
    common: &Common,
    stop: &CancellationToken,
    parts: &mut JoinSet<()>,
) {
    let intake = Intake {
        ingress,
        store: common.store.clone(),
        keyring: Arc::clone(&common.keyring),
        policy: common.policy.clone(),
        // Each transport that requests come from has one.
        proof: common.proofs.get(I::TRANSPORT).cloned().unwrap_or(Proof::Broker),
        targets: common.targets.clone(),
        dsm: Arc::clone(&common.dsm),
        metrics: common.metrics.clone(),
        health: common.health.clone(),
        part,
        limits: common.limits,
        fuse: common.fuse.clone(),
        jobs: Arc::clone(&common.jobs),
        events: Arc::clone(&common.events),
    };
    let stop = stop.clone();
    parts.spawn(async move { intake.run(stop).await });
}

fn spawn_relay<D: Destination + 'static>(
    destination: D,
    common: &Common,
    drain: &CancellationToken,
    relays: &mut JoinSet<()>,
) {
    let relay = Relay {
        destination,
        store: common.store.clone(),
        metrics: common.metrics.clone(),
        health: common.health.clone(),
        events: Arc::clone(&common.events),
    };
    let drain = drain.clone();
    relays.spawn(async move { relay.run(drain).await });
}

/// By which each transport's senders are known. Principals that it cannot prove are warned of.
fn proofs(loaded: &Loaded, policy: &Policy) -> Result<HashMap<&'static str, Proof>, ConfigError> {
    let mut proofs = HashMap::new();
    for transport in &loaded.settings.requests_from {
        let proof = loaded.proof(*transport, policy)?;
        if let Some(warning) = policy.unproved(transport.as_str(), &proof) {
            tracing::warn!("policy: {warning}");
        }
        proofs.insert(transport.as_str(), proof);
    }
    Ok(proofs)
}

/// Says in the store how far apart calls with scarce quotas are to be, in all lanes of the targets: before the first claim.
async fn govern(loaded: &Loaded, store: &Store) -> Result<Rates, StartError> {
    let rates = loaded.rates()?;
    let mut lanes = Vec::new();
    for target in loaded.targets()? {
        for (region, &operation) in
            target.regions.iter().flat_map(|region| Scarce::ALL.iter().map(move |one| (region, one)))
        {
            let lane = QuotaLane { account: target.account.clone(), region: region.clone(), operation };
            lanes.push((lane, rates.pace(&target.account, region, operation)));
        }
    }
    lanes.sort_by(|(one, _), (other, _)| one.cmp(other));
    lanes.dedup_by(|(one, _), (other, _)| one == other);
    let changed = store.govern(&lanes).await?;
    if changed > 0 {
        tracing::info!(lanes.changed = changed, "the quotas of the settings hold from now on, in all workers");
    }
    for warning in rates.warnings() {
        tracing::warn!("{warning}");
    }
    Ok(rates)
}

/// How many jobs of one key, and of one account and Region, may wait.
pub fn limits(settings: &IntakeSettings) -> Limits {
    Limits { line: settings.max_waiting_per_key, lane: settings.max_waiting_per_lane }
}

fn marks(settings: &IntakeSettings) -> Marks {
    Marks { pause_above: settings.pause_above, resume_below: settings.resume_below }
}

/// The accounts of the settings, and how they are reached. Reads the files of external ids.
pub fn accounts(loaded: &Loaded) -> Result<Vec<Account>, ConfigError> {
    let account = |target: &Target| {
        let role = match &target.role_arn {
            None => None,
            Some(arn) => Some(Role {
                arn: arn.clone(),
                external_id: loaded.external_id(target)?,
                session_name: target.session_name.clone(),
                session: target.session(),
            }),
        };
        Ok(Account {
            partition: target.partition.clone(),
            account: target.account.clone(),
            regions: target.regions.clone(),
            role,
            sts_region: target.sts_region().to_owned(),
            is_fips: target.fips,
            is_dual_stack: target.dual_stack,
            endpoints: target.endpoints.clone(),
        })
    };
    loaded.targets()?.iter().map(account).collect()
}

/// The accounts and Regions of the settings.
pub fn targets(loaded: &Loaded) -> Result<Targets, ConfigError> {
    let each = loaded.targets()?.iter().flat_map(|target| {
        target.regions.iter().map(|region| (target.partition.clone(), target.account.clone(), region.clone()))
    });
    Ok(Targets::new(each))
}
