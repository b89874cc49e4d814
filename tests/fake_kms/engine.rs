//! What happens to an authenticated call: quota, fault, the operation itself, and its line in the journal.
//!
//! A call runs to its end even if its client goes away, as it would at AWS. Effect and journal entry are made in one
//! critical section, so the journal's order is the order of effects.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::Value;
use tokio::sync::oneshot;
use tokio::task::spawn_blocking;

use crate::crypto::{Opened, Unopened};
use crate::faults::{Fault, error_answer};
use crate::journal::Entry;
use crate::keys::Key;
use crate::operations::{Done, Errand, Halt, Job, Work, apply, internal};
use crate::refusal::{self, Refusal};
use crate::world::{Call, Held, Late, World};

/// What the client gets to see.
pub enum Answer {
    /// An answer.
    Reply(Result<Value, Refusal>),
    /// A connection that is closed without an answer.
    Cut(Duration),
}

/// Takes a call through the double.
pub async fn answer(world: Arc<World>, mut call: Call) -> Answer {
    let fault = match admit(&world, &mut call) {
        Ok(fault) => fault,
        Err(refusal) => return Answer::Reply(Err(refusal)),
    };
    let latency = world.latency_ms();
    if latency > 0 {
        tokio::time::sleep(Duration::from_millis(latency)).await;
    }
    match fault {
        None => Answer::Reply(perform(&world, &call, false).await),
        Some(Fault::StaleDescribe) => Answer::Reply(perform(&world, &call, true).await),
        Some(Fault::Throttle) => Answer::Reply(Err(refusal::throttled())),
        Some(Fault::Hang { ms }) => Answer::Cut(after(ms.or(Some(86_400_000)))),
        Some(Fault::Error { code, status, message, after_effect }) => {
            if after_effect {
                drop(perform(&world, &call, false).await);
            }
            Answer::Reply(Err(error_answer(&code, status, &message)))
        }
        Some(Fault::LoseAnswer { ms }) => {
            drop(perform(&world, &call, false).await);
            Answer::Cut(after(ms))
        }
        Some(Fault::Late { ms, hang_ms }) => {
            postpone(&world, call, ms);
            Answer::Cut(after(hang_ms))
        }
        Some(Fault::Hold) => {
            hold(&world, &call).await;
            Answer::Reply(perform(&world, &call, false).await)
        }
    }
}

/// Makes all pending late effects happen now, in the order of their calls, and says how many there were.
pub async fn release_late(world: &World) -> usize {
    let due: Vec<_> = world.state().late.iter_mut().filter_map(|late| Some((late.id, late.call.take()?))).collect();
    let count = due.len();
    for (id, call) in due {
        take_effect(world, id, &call).await;
    }
    // A timer may have been faster with one of them; its effect must be there too before the test goes on.
    loop {
        let moved = world.moved.notified();
        tokio::pin!(moved);
        moved.as_mut().enable();
        if world.state().late.iter().all(|late| late.call.is_some()) {
            return count;
        }
        moved.await;
    }
}

/// Unwraps whatever of these keys' materials is still sealed.
pub async fn open_all(world: &World, jobs: Vec<Job>) {
    if !jobs.is_empty() {
        open(world, jobs).await;
    }
}

/// The quota's and the faults' say. Calls that have no effect are journalled here.
fn admit(world: &World, call: &mut Call) -> Result<Option<Fault>, Refusal> {
    let now = world.now();
    let mut state = world.state();
    let quotas = &mut state.quotas;
    let is_within = quotas.admit(&call.principal.account, &call.region, call.operation, now)
        && call.key_arn.as_ref().is_none_or(|key| quotas.admit_change(key, call.operation, now));
    if !is_within {
        state.journal.push(call.entry(now, "throttled"));
        return Err(refusal::throttled());
    }
    let fault = state.faults.take(call.operation, call.key_arn.as_deref());
    call.fault = fault.as_ref().map(Fault::kind);
    let outcome = match &fault {
        Some(Fault::Error { code, after_effect: false, .. }) => Some(code.clone().into()),
        Some(Fault::Throttle) => Some("throttled".into()),
        Some(Fault::Hang { .. }) => Some("hang".into()),
        Some(Fault::Late { .. }) => Some("late".into()),
        _ => None::<std::borrow::Cow<'static, str>>,
    };
    if let Some(outcome) = outcome {
        state.journal.push(call.entry(now, outcome));
    }
    Ok(fault)
}

async fn perform(world: &World, call: &Call, outdated: bool) -> Result<Value, Refusal> {
    let mut work = Work { call, now: world.now(), lazy: world.lazy, outdated, offered: None, signature: None };
    loop {
        let errand = {
            work.now = world.now();
            let mut state = world.state();
            match apply(&mut state, &mut work) {
                Ok(Done { body, effect, key_arn }) => {
                    let entry = call.entry(work.now, "ok");
                    state.journal.push(Entry {
                        effect: effect.map(Box::new),
                        key_arn: key_arn.or_else(|| entry.key_arn.clone()),
                        ..entry
                    });
                    return Ok(body);
                }
                Err(Halt::Refused(refusal)) => {
                    state.journal.push(call.entry(work.now, refusal.code.clone()));
                    return Err(refusal);
                }
                Err(Halt::First(errand)) => errand,
            }
        };
        let done = match errand {
            Errand::Unwrap(jobs) => open(world, jobs).await.map(|own| work.offered = own.or(work.offered.take())),
            Errand::Sign(pair, algorithm, message) => spawn_blocking(move || pair.sign(algorithm, &message))
                .await
                .ok()
                .map(|signature| work.signature = Some(signature)),
        };
        if done.is_none() {
            return Err(internal("the process ends"));
        }
    }
}

type Offered = Option<Result<Opened, Unopened>>;

/// Unwraps outside the lock; stored material is put back, the call's own is returned. `None` at the process's end.
async fn open(world: &World, jobs: Vec<Job>) -> Option<Offered> {
    let opened = spawn_blocking(move || {
        jobs.into_iter()
            .map(|job| {
                let opened = job.sealed.open(job.spec);
                (job, opened)
            })
            .collect::<Vec<_>>()
    });
    let opened = opened.await.ok()?;
    let now = world.now();
    let mut own = None;
    let mut guard = world.state();
    let state = &mut *guard;
    for (job, opened) in opened {
        match job.key_arn {
            None => own = Some(opened),
            Some(arn) => {
                if let Ok(key) = state.keys.find(&arn, now, &mut state.journal) {
                    Key::open(key, &job.sealed, opened);
                }
            }
        }
    }
    Some(own)
}

fn after(ms: Option<u64>) -> Duration {
    Duration::from_millis(ms.unwrap_or(0))
}

async fn hold(world: &World, call: &Call) {
    let (release, released) = oneshot::channel();
    {
        let mut state = world.state();
        let id = state.next_id();
        state.held.push(Held { id, call: call.clone(), release });
    }
    world.moved.notify_waiters();
    drop(released.await);
}

fn postpone(world: &Arc<World>, mut call: Call, ms: Option<u64>) {
    call.late = true;
    let id = {
        let mut state = world.state();
        let id = state.next_id();
        state.late.push(Late { id, call: Some(call) });
        id
    };
    world.moved.notify_waiters();
    let Some(ms) = ms else { return };
    let world = Arc::clone(world);
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(ms)).await;
        let due = world.state().late.iter_mut().find(|late| late.id == id).and_then(|late| late.call.take());
        if let Some(call) = due {
            take_effect(&world, id, &call).await;
        }
    });
}

async fn take_effect(world: &World, id: u64, call: &Call) {
    drop(perform(world, call, false).await);
    world.state().late.retain(|late| late.id != id);
    world.moved.notify_waiters();
}

/// Notes that the client has gone away, unless the call was answered before.
pub struct Attendance(Option<Arc<std::sync::atomic::AtomicBool>>);

impl Attendance {
    /// Watches over a call.
    pub fn of(call: &Call) -> Self {
        Self(Some(Arc::clone(&call.gone)))
    }

    /// The call is answered.
    pub fn end(mut self) {
        self.0 = None;
    }
}

impl Drop for Attendance {
    fn drop(&mut self) {
        if let Some(gone) = &self.0 {
            gone.store(true, Ordering::Release);
        }
    }
}
