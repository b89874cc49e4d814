//! Several workers on one queue, and one that is thought dead and is not.

use crate::aws_errors::CLOSED;
use crate::support::proof::decrypts;
use crate::support::world::{Tuning, Worker, World, request};
use rustix::process::Signal;
use serde_json::json;
use time::format_description::well_known::Rfc3339;

#[tokio::test]
async fn two_workers_share_the_work() {
    let mut world = World::new(Tuning { concurrency: 4, ..Tuning::default() }).await;
    world.symmetric_key("payroll").await;
    let arns = world.fake.seed(json!({"count": 24})).await;
    for round in 0..3 {
        for (number, arn) in arns.iter().enumerate() {
            // Each twice: both workers may hold a copy at the same time.
            let request = request(&format!("r{number}-{round}"), arn, json!({"source_key_identifier": "payroll"}));
            world.publish(request.clone()).await;
            world.publish(request).await;
        }
    }
    world.start("").await;
    world.start("").await;
    for number in 0..arns.len() {
        world.succeeded(&format!("r{number}-2")).await;
    }
    crate::support::eventually("every job was counted in one of them", || async {
        let mut sum = 0.0;
        for worker in &world.workers {
            sum += worker.metric("keyferry_jobs_finished_total{code=\"\",outcome=\"succeeded\"}").await;
        }
        (sum > 71.5).then_some(())
    })
    .await;
    world.finish().await;
}

#[tokio::test]
async fn a_worker_that_slept_past_its_lease_commits_nothing() {
    let mut world = World::new(Tuning::hasty()).await;
    let bytes = world.symmetric_key("payroll").await;
    let arn = world.fake.key().await;
    let sleeper = world.serve().await;
    world.fake.fault("ImportKeyMaterial", &arn, Some(1), json!({"kind": "hold"})).await;
    world.publish(request("r1", &arn, json!({"source_key_identifier": "payroll"}))).await;
    world.fake.held(1, "ImportKeyMaterial", &arn).await;
    // It sleeps in the middle of the import; the answer comes meanwhile, and waits for it.
    world.workers[sleeper].signal(Signal::STOP);
    world.fake.release(&arn).await;
    let successor = world.serve().await;
    let job = world.succeeded("r1").await;
    // The sleeper's call used up the import token that it left behind: one attempt may find that out.
    assert!((2..=3).contains(&job.attempts), "{job:?}");
    let entries = "select count(*) from audit_entry where subject = (select id from job)";
    let before = world.count(entries).await;
    world.workers[sleeper].signal(Signal::CONT);
    crate::support::eventually("the sleeper learns that its lease is another's", || async {
        (world.workers[sleeper].metric("keyferry_leases_lost_total").await >= 1.0).then_some(())
    })
    .await;
    assert_eq!(world.count(entries).await, before, "its late commit was refused");
    assert!(world.workers[successor].metric("keyferry_leases_lost_total").await < 0.5);
    assert!(decrypts(&world.fake, &arn, &bytes).await);
    // Both go on working.
    let more = world.fake.seed(json!({"count": 8})).await;
    for (number, arn) in more.iter().enumerate() {
        world.publish(request(&format!("m{number}"), arn, json!({}))).await;
    }
    for number in 0..more.len() {
        world.succeeded(&format!("m{number}")).await;
    }
    world.finish().await;
}

#[tokio::test]
async fn a_takeover_closes_the_line_to_the_next_job_that_contradicts() {
    let mut world = World::new(Tuning { signature_life_ms: 600_000, ..Tuning::hasty() }).await;
    world.symmetric_key("payroll").await;
    let arn = world.fake.key().await;
    let valid_to = (world.now().await + time::Duration::days(9)).format(&Rfc3339).unwrap();
    world.publish(request("r1", &arn, json!({"source_key_identifier": "payroll"}))).await;
    // Nobody knows whether it made the call before it died.
    let first = world.start("worker.after_prepare=return").await;
    assert!(world.workers[first].aborted().await);
    let more = json!({"source_key_identifier": "payroll", "key_expiration": true, "valid_to": valid_to});
    world.publish(request("r2", &arn, more)).await;
    world.serve().await;
    world.succeeded("r1").await;
    world.until("the line is closed", CLOSED, 1).await;
    assert_eq!(world.job("r2").await.unwrap().state, "waiting");
    world.db.advance(std::time::Duration::from_secs(600)).await;
    world.succeeded("r2").await;
    world.finish().await;
}

/// A key whose import a worker left under way when it went, and a job with another expiry behind it: what the other worker
/// has imported meanwhile stands, and the line is closed until the import has taken effect after all.
struct LateImport {
    world: World,
    gone: usize,
    arn: String,
    bytes: Vec<u8>,
}

impl LateImport {
    async fn of_a_worker_that(goes: impl Fn(&mut Worker)) -> Self {
        let mut world = World::new(Tuning { signature_life_ms: 600_000, ..Tuning::hasty() }).await;
        let bytes = world.symmetric_key("payroll").await;
        let arn = world.fake.key().await;
        let valid_to = (world.now().await + time::Duration::days(9)).format(&Rfc3339).unwrap();
        // Were an import token good for one import only, the late effect could not happen.
        world.fake.options(json!({"single_use_tokens": false})).await;
        world.fake.fault("ImportKeyMaterial", &arn, Some(1), json!({"kind": "hold"})).await;
        let gone = world.serve().await;
        world.publish(request("r1", &arn, json!({"source_key_identifier": "payroll"}))).await;
        world.fake.held(1, "ImportKeyMaterial", &arn).await;
        let more = json!({"source_key_identifier": "payroll", "key_expiration": true, "valid_to": valid_to});
        world.publish(request("r2", &arn, more)).await;
        world.until("the other waits behind it", "select count(*) from job where state = 'waiting'", 2).await;
        goes(&mut world.workers[gone]);
        world.serve().await;
        world.succeeded("r1").await;
        world.until("the line is closed", CLOSED, 1).await;
        world.fake.release(&arn).await;
        world.fake.wait(2, &format!("key={arn}&effect=imported")).await;
        Self { world, gone, arn, bytes }
    }

    async fn undoes_nothing(self) {
        assert_eq!(self.world.job("r2").await.unwrap().state, "waiting");
        self.world.db.advance(std::time::Duration::from_secs(600)).await;
        self.world.succeeded("r2").await;
        assert_eq!(self.world.fake.show(&self.arn).await["expiration_model"], "KEY_MATERIAL_EXPIRES");
        assert!(decrypts(&self.world.fake, &self.arn, &self.bytes).await);
        self.world.finish().await;
    }
}

#[tokio::test]
async fn a_dead_workers_call_that_takes_effect_late_undoes_nothing() {
    let late = LateImport::of_a_worker_that(Worker::kill).await;
    late.world.fake.wait(1, &format!("key={}&late=true&effect=imported", late.arn)).await;
    late.undoes_nothing().await;
}

/// A worker that is about to import into a key, and waits for the parameters.
async fn about_to_import() -> (World, usize, String) {
    let mut world = World::new(Tuning::hasty()).await;
    world.symmetric_key("payroll").await;
    let arn = world.fake.key().await;
    let worker = world.serve().await;
    world.fake.fault("GetParametersForImport", &arn, Some(1), json!({"kind": "hold"})).await;
    world.publish(request("r1", &arn, json!({"source_key_identifier": "payroll"}))).await;
    world.fake.held(1, "GetParametersForImport", &arn).await;
    (world, worker, arn)
}

impl World {
    /// Wakes a worker that slept past its lease, and waits until it has given up its job: it has imported nothing.
    async fn wake(&self, sleeper: usize, arn: &str) {
        self.workers[sleeper].signal(Signal::CONT);
        crate::support::eventually("the sleeper gives up", || async {
            let lost = self.workers[sleeper].metric("keyferry_leases_lost_total").await;
            (lost >= 1.0 && self.workers[sleeper].metric("keyferry_jobs_running").await < 0.5).then_some(())
        })
        .await;
        assert_eq!(self.fake.journal(&format!("key={arn}&operation=ImportKeyMaterial")).await.len(), 1);
    }
}

#[tokio::test]
async fn a_worker_that_slept_before_its_import_does_not_send_it() {
    let (mut world, sleeper, arn) = about_to_import().await;
    world.workers[sleeper].signal(Signal::STOP);
    world.fake.release(&arn).await;
    world.serve().await;
    world.succeeded("r1").await;
    world.wake(sleeper, &arn).await;
    world.finish().await;
}

/// It slept on what it knew, the delete behind its job was done meanwhile, and it wakes up with an import in its hands.
#[tokio::test]
async fn a_worker_that_slept_past_its_lease_does_not_undo_the_delete_that_followed() {
    let (mut world, sleeper, arn) = about_to_import().await;
    world.publish(request("r2", &arn, json!({"operation": "delete"}))).await;
    world.until("the delete waits behind it", "select count(*) from job where state = 'waiting'", 2).await;
    world.workers[sleeper].signal(Signal::STOP);
    world.fake.release(&arn).await;
    world.serve().await;
    world.succeeded("r1").await;
    world.succeeded("r2").await;
    world.wake(sleeper, &arn).await;
    let shown = world.fake.show(&arn).await;
    assert!(shown["materials"].as_array().unwrap().iter().all(|held| held["imported"] == false), "{shown:#}");
    world.finish().await;
}

/// Its import is under way while it sleeps, and takes effect late; a job with another expiry waits until that is over.
#[tokio::test]
async fn the_late_import_of_a_sleeper_does_not_undo_the_expiry_that_followed() {
    let late = LateImport::of_a_worker_that(|worker| worker.signal(Signal::STOP)).await;
    let sleeper = &late.world.workers[late.gone];
    sleeper.signal(Signal::CONT);
    crate::support::eventually("the sleeper learns that its lease is another's", || async {
        (sleeper.metric("keyferry_leases_lost_total").await >= 1.0).then_some(())
    })
    .await;
    late.undoes_nothing().await;
}
