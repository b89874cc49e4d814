//! What operators watch of the whole store, read again and again. Every worker does: the numbers are the same.

use super::Context;
use super::meters::Within;
use crate::store::{Bounds, StoreError};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

const EVERY: Duration = Duration::from_secs(5);
/// So often what seldom changes is read, and lower bounds are forgotten, for what was committed late.
const SELDOM: Duration = Duration::from_secs(60);

/// Samples until `stop`.
pub(super) async fn sample(context: Arc<Context>, stop: CancellationToken) {
    let mut bounds = Bounds::default();
    let mut seldom_at = Instant::now();
    loop {
        context.meters.note_own(&context.store);
        let is_seldom = Instant::now() >= seldom_at;
        if is_seldom {
            bounds = Bounds::default();
        }
        let sampled = tokio::select! {
            () = stop.cancelled() => return,
            sampled = sample_once(&context, &mut bounds, is_seldom) => sampled,
        };
        match sampled {
            Ok(()) if is_seldom => seldom_at = Instant::now() + SELDOM,
            Ok(()) => {}
            // The gauges stay as they were; the time of the last sample says so.
            Err(error) => tracing::warn!(error.message = %error, "the store could not be sampled for metrics"),
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(EVERY) => {}
        }
    }
}

async fn sample_once(context: &Context, bounds: &mut Bounds, is_seldom: bool) -> Result<(), StoreError> {
    let (store, meters) = (&context.store, &context.meters);
    if is_seldom {
        meters.note_expired(store.keys_expiring(Duration::ZERO).await?, store.keys_expired_lately().await?);
        let (none, few) = store.keys_with_few_rotations().await?;
        meters.note_rotations_left(none, few);
        for &within in Within::ALL {
            meters.note_expiring(within, store.keys_expiring(within.span()).await?);
        }
    }
    let work = store.observe_work(bounds).await?;
    let events = store.observe_outbox(bounds).await?;
    meters.note_slowed(&store.quota_slowed().await?);
    meters.note_work(&work, &events);
    Ok(())
}
