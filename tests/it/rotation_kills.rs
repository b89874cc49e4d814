//! Death at every durable boundary of a rotate, in one Region and in two; twice; and with a stranger who does something to
//! the key while nobody is there. One new material, one rotation, whatever happens: the invariants are judged after each.

use crate::support::eventually;
use crate::support::world::{Tuning, World, random, request};
use aws_sdk_kms::types::ImportType;
use serde_json::{Value, json};
use std::time::Duration;

/// Where a process dies, in the order of a rotate's path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Boundary {
    Claimed,
    Parameters,
    Chosen,
    Wrapped,
    Sent,
    Answered,
    Brought,
    ReplicaParameters,
    ReplicaChosen,
    ReplicaSent,
    ReplicaAnswered,
    Replicated,
    TurnChosen,
    TurnSent,
    TurnAnswered,
    Turned,
    Ended,
}

use Boundary::{
    Answered, Brought, Chosen, Claimed, Ended, Parameters, ReplicaAnswered, ReplicaChosen, ReplicaParameters,
    ReplicaSent, Replicated, Sent, TurnAnswered, TurnChosen, TurnSent, Turned, Wrapped,
};

impl Boundary {
    /// As the crate `fail` writes it. The call to the replica is the second of its kind.
    fn failpoints(self) -> &'static str {
        match self {
            Claimed => "worker.after_claim=return",
            Parameters => "worker.after_parameters=return",
            Chosen => "worker.after_prepare=return",
            Wrapped => "worker.after_wrap=return",
            Sent => "kms.before_answer=return",
            Answered => "worker.after_answer=return",
            Brought => "worker.after_import=return",
            ReplicaParameters => "worker.after_replica_parameters=return",
            ReplicaChosen => "worker.after_replica_prepare=return",
            ReplicaSent => "kms.before_answer=1*off->return",
            ReplicaAnswered => "worker.after_answer=1*off->return",
            Replicated => "worker.after_replica_import=return",
            TurnChosen => "worker.after_turn_prepare=return",
            TurnSent => "kms.before_rotate_answer=return",
            TurnAnswered => "worker.after_rotate_answer=return",
            Turned => "worker.after_rotate=return",
            Ended => "worker.before_settle=return",
        }
    }
}

/// What a stranger does while nobody is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stranger {
    /// Rotates to what waits.
    Rotates,
    /// Deletes what waits.
    Deletes,
    /// Brings material of his own, in the place of what waits.
    Replaces,
}

/// A world in which processes die, one scenario after the other, each with a key of its own.
struct Deaths {
    world: World,
    /// Keys that hold their first material, and no job has rotated.
    fresh: Vec<String>,
    scenarios: usize,
}

impl Deaths {
    /// With keys of so many Regions.
    async fn begin(scenarios: usize, regions: usize) -> Self {
        // What was unanswered is over soon; leases run out when the clock is moved.
        let tuning = Tuning { signature_life_ms: 2_000, aws_timeout_ms: 1_500, ..Tuning::default() };
        let mut world = World::new(tuning).await;
        world.respell("[database]", "[database]\nconnections = 3\nconnect_timeout_ms = 30000");
        world.symmetric_key("first").await;
        let at = world.serve().await;
        let fresh = world.fake.seed(json!({"count": scenarios, "multi_region": regions == 2})).await;
        let mut all = fresh.clone();
        if regions == 2 {
            for arn in &fresh {
                all.push(world.fake.replica(arn, "us-east-1").await);
            }
        }
        for (number, arn) in all.iter().enumerate() {
            world.publish(request(&format!("first-{number}"), arn, json!({"source_key_identifier": "first"}))).await;
        }
        for number in 0..all.len() {
            world.succeeded(&format!("first-{number}")).await;
        }
        world.workers[at].stop().await;
        Self { world, fresh, scenarios: 0 }
    }

    /// Asks for the rotation of a fresh key.
    async fn ask(&mut self) -> (String, String) {
        self.scenarios += 1;
        let (id, arn) = (format!("r{}", self.scenarios), self.fresh.pop().expect("a fresh key for each scenario"));
        self.world.publish(request(&id, &arn, json!({"operation": "rotate"}))).await;
        (id, arn)
    }

    /// A process that dies at the boundary, or does all that is left; says whether it died. Its leases run out.
    async fn die_at(&mut self, boundary: Boundary, id: &str) -> bool {
        self.die_by(boundary.failpoints(), id).await
    }

    async fn die_by(&mut self, failpoints: &str, id: &str) -> bool {
        let at = self.world.start(failpoints).await;
        let workers = std::cell::RefCell::new(std::mem::take(&mut self.world.workers));
        let died = eventually(&format!("{failpoints}: an end of some kind"), || async {
            let is_running = workers.borrow_mut()[at].is_running();
            let has_ended = self.world.job(id).await.is_some_and(|job| job.state != "waiting");
            (!is_running || has_ended).then_some(!is_running)
        })
        .await;
        self.world.workers = workers.into_inner();
        if !died {
            self.world.workers[at].stop().await;
        }
        self.world.db.advance(Duration::from_secs(31)).await;
        died
    }

    /// A process that lives does what is left. One that `looks` for what is gone does so until the clock is moved.
    async fn drain(&mut self, looks: bool) {
        let at = self.world.serve().await;
        let id = format!("r{}", self.scenarios);
        let job = if looks { self.world.ended_after_looking(&id).await } else { self.world.ended(&id).await };
        assert!(job.state == "succeeded" || job.aws_changed() || job.code() == "pending_foreign", "{job:?}");
        self.world.workers[at].stop().await;
        self.world.judge().await;
    }
}

/// Each boundary alone.
async fn dies_at(boundaries: &[Boundary], regions: usize) {
    let deaths = Deaths::begin(boundaries.len(), regions).await;
    each_alone(deaths, boundaries).await;
}

async fn each_alone(mut deaths: Deaths, boundaries: &[Boundary]) {
    for boundary in boundaries {
        let (id, _) = deaths.ask().await;
        assert!(deaths.die_at(*boundary, &id).await, "{boundary:?} did not end the worker");
        deaths.drain(false).await;
        deaths.world.succeeded(&id).await;
    }
    deaths.world.finish().await;
}

#[tokio::test]
async fn on_the_way_to_aws() {
    dies_at(&[Claimed, Parameters, Chosen, Wrapped], 1).await;
}

#[tokio::test]
async fn while_the_material_is_brought() {
    dies_at(&[Sent, Answered, Brought], 1).await;
}

#[tokio::test]
async fn while_the_key_is_turned() {
    dies_at(&[TurnChosen, TurnSent, TurnAnswered, Turned, Ended], 1).await;
}

#[tokio::test]
async fn while_a_rotation_takes_its_time() {
    let boundaries = [TurnSent, TurnAnswered, Turned];
    let deaths = Deaths::begin(boundaries.len(), 1).await;
    // Longer than what was sent before can take effect.
    deaths.world.fake.options(json!({"rotation_ms": 4_000})).await;
    each_alone(deaths, &boundaries).await;
}

#[tokio::test]
async fn while_a_replica_is_given_the_material() {
    dies_at(&[ReplicaParameters, ReplicaChosen, ReplicaSent, ReplicaAnswered, Replicated], 2).await;
}

#[tokio::test]
async fn while_a_key_of_two_regions_is_brought_and_turned() {
    dies_at(&[Sent, Brought, TurnChosen, TurnSent, TurnAnswered], 2).await;
}

/// The first process dies at the one boundary; its successor at each of the others that it still comes past.
async fn dies_twice_from(first: Boundary, least: usize) {
    let seconds = [Sent, Replicated, TurnChosen, TurnSent, Ended];
    let mut deaths = Deaths::begin(seconds.len(), 2).await;
    let mut died = 0;
    for second in seconds {
        let (id, _) = deaths.ask().await;
        assert!(deaths.die_at(first, &id).await, "{first:?} did not end the worker");
        died += usize::from(deaths.die_at(second, &id).await);
        deaths.drain(false).await;
        deaths.world.succeeded(&id).await;
    }
    assert!(died >= least, "after {first:?} {died} of five successors died");
    deaths.world.finish().await;
}

macro_rules! twice {
    ($($name:ident: $first:ident, $least:literal;)*) => {
        mod twice {
            $(#[tokio::test] async fn $name() { super::dies_twice_from(super::Boundary::$first, $least).await; })*
        }
    };
}

twice! {
    from_the_choice: Chosen, 5;
    from_the_import: Sent, 5;
    from_its_answer: Brought, 5;
    from_the_replicas_turn: ReplicaChosen, 5;
    from_the_replicas_import: ReplicaSent, 3;
    from_the_turn: TurnChosen, 3;
    from_the_rotation: TurnSent, 1;
    from_its_end: TurnAnswered, 1;
}

#[tokio::test]
async fn while_an_abandoned_rotate_takes_its_material_away() {
    let failpoints = ["worker.after_remove_prepare=return", "kms.before_answer=return"];
    let mut deaths = Deaths::begin(failpoints.len(), 1).await;
    for failpoint in failpoints {
        let (id, arn) = deaths.ask().await;
        assert!(deaths.die_at(TurnChosen, &id).await);
        let ran = deaths.world.run(&["jobs", "abandon", &id, "--yes", "--json"]).await;
        assert_eq!(ran.code, Some(0), "{ran:?}");
        assert!(deaths.die_by(failpoint, &id).await, "{failpoint} did not end the worker");
        let at = deaths.world.serve().await;
        // What was taken away without an answer is looked for, for a while.
        let job = deaths.world.ended_after_looking(&id).await;
        assert_eq!(job.code(), "abandoned", "{job:?}");
        deaths.world.workers[at].stop().await;
        deaths.world.judge().await;
        let shown = deaths.world.fake.show(&arn).await;
        assert_eq!(shown["materials"].as_array().unwrap().len(), 1, "{failpoint}: {shown:#}");
    }
    deaths.world.finish().await;
}

/// A stranger has the key to himself for a while.
async fn meddled(stranger: Stranger, boundaries: &[Boundary], regions: usize, codes: &[&str]) {
    let mut deaths = Deaths::begin(boundaries.len(), regions).await;
    for boundary in boundaries {
        let (id, arn) = deaths.ask().await;
        assert!(deaths.die_at(*boundary, &id).await, "{boundary:?} did not end the worker");
        let shown = deaths.world.fake.show(&arn).await;
        let waits = |held: &&Value| held["role"].as_str().unwrap().starts_with("PENDING");
        let waits =
            shown["materials"].as_array().unwrap().iter().find(waits).map(|held| held["key_material_id"].clone());
        match (stranger, waits) {
            (Stranger::Rotates, Some(_)) => deaths.world.fake.stranger_rotates(&arn).await,
            (Stranger::Deletes, Some(id)) => deaths.world.fake.stranger_deletes(&arn, id.as_str()).await,
            (Stranger::Replaces, waits) => {
                if let Some(id) = waits {
                    deaths.world.fake.stranger_deletes(&arn, id.as_str()).await;
                }
                let new = Some(ImportType::NewKeyMaterial);
                deaths.world.fake.stranger_imports_as(&arn, &random(32), new, None).await.unwrap();
            }
            (_, None) => panic!("{boundary:?}: nothing waits: {shown:#}"),
        }
        deaths.drain(codes.contains(&"pending_lost")).await;
        let job = deaths.world.ended(&id).await;
        let end = if job.state == "succeeded" { "succeeded" } else { job.code() };
        assert!(codes.contains(&end), "{stranger:?} after {boundary:?}: {job:?}");
    }
    deaths.world.finish().await;
}

#[tokio::test]
async fn a_stranger_who_rotates_has_done_the_jobs_work() {
    meddled(Stranger::Rotates, &[Sent, Brought, TurnChosen], 1, &["succeeded"]).await;
}

#[tokio::test]
async fn a_stranger_who_deletes_what_waits_makes_it_come_again_or_ends_the_job() {
    // Of one that had no answer nobody can say that it was ever there.
    meddled(Stranger::Deletes, &[Sent], 1, &["succeeded"]).await;
    meddled(Stranger::Deletes, &[TurnChosen], 1, &["pending_lost"]).await;
}

#[tokio::test]
async fn a_stranger_who_brings_his_own_keeps_it() {
    meddled(Stranger::Replaces, &[Chosen, Sent, TurnChosen], 1, &["pending_foreign"]).await;
}

#[tokio::test]
async fn a_stranger_in_a_key_of_two_regions() {
    meddled(Stranger::Rotates, &[Replicated], 2, &["succeeded"]).await;
    meddled(Stranger::Replaces, &[ReplicaSent], 2, &["pending_foreign"]).await;
}
