//! Composition: settings in, a running worker out, and its orderly end.

use crate::amqp::Broker;
use crate::config::{ConfigError, Loaded};
use crate::ingress::rabbitmq::Queue;
use crate::intake::Intake;
use crate::kms::Kms;
use crate::outbox::Relay;
use crate::outbox::rabbitmq::Exchange;
use crate::policy::Targets;
use crate::source::{Dsm, Kek, KekError, Keyring};
use crate::store::{SchemaError, Store, StoreError};
use crate::telemetry::{Health, Metrics, Part, serve_admin};
use crate::worker::{self, Context};
use secrecy::ExposeSecret as _;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

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

/// The store, with a schema that fits.
pub async fn open_store(loaded: &Loaded) -> Result<Store, StartError> {
    let store = Store::new(loaded.database_url()?, &loaded.settings.database)?;
    store.check_schema().await?;
    Ok(store)
}

/// The keys of the local tier; refuses a key-encryption key that did not seal this store.
pub async fn open_keyring(loaded: &Loaded, store: &Store) -> Result<Keyring, StartError> {
    let kek = Kek::parse(loaded.kek()?.expose_secret())?;
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

/// Runs the worker until `stop`, then ends it in order: intake, jobs under way, events, and the rest.
pub async fn serve(loaded: &Loaded, stop: CancellationToken) -> Result<(), StartError> {
    let settings = &loaded.settings;
    // Everything that can be wrong is found before the first message is taken.
    let policy = loaded.policy()?;
    let targets = targets(loaded)?;
    let broker = open_broker(loaded)?;
    let store = open_store(loaded).await?;
    let keyring = Arc::new(open_keyring(loaded, &store).await?);
    let metrics = Metrics::new()?;
    let dsm = Arc::new(open_dsm(loaded, &metrics)?);
    let health = Health::of(&[Part::Store, Part::RabbitMq, Part::Events]);
    health.set(Part::Store, true);
    let (jobs, events) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let regions = loaded.targets()?.iter().flat_map(|target| target.regions.iter().cloned());
    let kms = Kms::connect(regions, settings.worker.aws_timeout(), metrics.clone()).await;

    let finished = CancellationToken::new();
    let (address, admin) = serve_admin(settings.admin.listen, metrics.clone(), health.clone(), finished.clone())
        .await
        .map_err(|error| StartError::Admin { address: settings.admin.listen, error })?;
    let admin = tokio::spawn(admin);
    tracing::info!(admin.address = %address, jobs.concurrency = settings.worker.concurrency, "starting");

    let intake = Intake {
        ingress: Queue {
            broker: broker.clone(),
            name: settings.rabbitmq.queue.clone(),
            prefetch: settings.rabbitmq.prefetch,
        },
        store: store.clone(),
        keyring: Arc::clone(&keyring),
        policy,
        targets: targets.clone(),
        dsm: Arc::clone(&dsm),
        metrics: metrics.clone(),
        health: health.clone(),
        part: Part::RabbitMq,
        jobs: Arc::clone(&jobs),
        events: Arc::clone(&events),
    };
    let relay = Relay {
        destination: Exchange { broker, name: settings.rabbitmq.exchange.clone() },
        store: store.clone(),
        metrics: metrics.clone(),
        health: health.clone(),
        events: Arc::clone(&events),
    };
    let context = Context {
        store,
        kms,
        keyring,
        dsm,
        policy,
        targets,
        settings: settings.worker.clone(),
        metrics,
        health,
        jobs,
        events,
    };
    let drain = CancellationToken::new();
    let (mut parts, mut relays) = (JoinSet::new(), JoinSet::new());
    let (stopping, draining) = (stop.clone(), drain.clone());
    relays.spawn(async move { relay.run(draining).await });
    parts.spawn(async move { intake.run(stopping).await });
    parts.spawn(worker::run(Arc::new(context), stop.clone()));

    let is_broken = tokio::select! {
        biased;
        () = stop.cancelled() => false,
        // No part ends by itself. Half a worker would only look alive.
        _ = parts.join_next() => !stop.is_cancelled(),
        _ = relays.join_next() => !stop.is_cancelled(),
    };
    stop.cancel();
    tracing::info!("stopping: no more messages are taken");
    while parts.join_next().await.is_some() {}
    drain.cancel();
    if tokio::time::timeout(settings.worker.grace(), relays.join_next()).await.is_err() {
        tracing::warn!("the grace time is over: events are left in the outbox for the next start");
    }
    drop(relays);
    finished.cancel();
    drop(tokio::time::timeout(Duration::from_secs(2), admin).await);
    if is_broken { Err(StartError::Broken) } else { Ok(()) }
}

fn targets(loaded: &Loaded) -> Result<Targets, ConfigError> {
    let each = loaded.targets()?.iter().flat_map(|target| {
        target.regions.iter().map(|region| (target.partition.clone(), target.account.clone(), region.clone()))
    });
    Ok(Targets::new(each))
}
