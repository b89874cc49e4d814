//! What goes wrong around a worker: PostgreSQL and RabbitMQ away, silent, full or read-only. Nothing is lost, nothing spins,
//! `/readyz` says what is missing as long as it is, and a metric tells what it was.

use crate::support::broker::JOBS;
use crate::support::eventually;
use crate::support::link::Link;
use crate::support::private_broker::PrivateBroker;
use crate::support::private_postgres::{Crash, PrivatePostgres};
use crate::support::world::{Tuning, World, request};
use serde_json::json;
use std::path::PathBuf;
use std::time::Duration;

/// Lines of a worker's log while something is away for some seconds. Whoever spins writes thousands.
const MOST_LINES: usize = 400;

impl World {
    /// Waits until `/readyz` says this.
    async fn says(&self, wanted: &str) {
        eventually(&format!("/readyz says {wanted}"), || async {
            let (_, body) = self.workers[0].ready().await?;
            (body.trim() == wanted).then_some(())
        })
        .await;
    }

    /// Waits until a series of the worker has come to this.
    async fn shows(&self, series: &str, at_least: f64) {
        eventually(&format!("{series} is {at_least}"), || async {
            (self.workers[0].metric(series).await >= at_least).then_some(())
        })
        .await;
    }

    async fn sessions(&self, role: &str) -> f64 {
        let series = format!("keyferry_broker_sessions_total{{role=\"{role}\",transport=\"rabbitmq\"}}");
        self.workers[0].metric(&series).await
    }

    fn lines(&self) -> usize {
        self.workers[0].log().lines().count()
    }

    /// Publishes imports, each into a key of its own.
    async fn ask(&mut self, ids: &[&str]) {
        for id in ids {
            let arn = self.fake.key().await;
            self.publish(request(id, &arn, json!({"source_key_identifier": "payroll"}))).await;
        }
    }
}

fn store_faults(kind: &str) -> String {
    format!("keyferry_store_faults_total{{kind=\"{kind}\"}}")
}

/// A worker that has done a job, so that its connections are warm, by way of a link to PostgreSQL.
async fn behind_a_link_to_postgres() -> (World, Link) {
    let mut world = World::new(Tuning::default()).await;
    world.symmetric_key("payroll").await;
    let url = world.db.worker_url();
    let link = Link::to(&url).await;
    world.respell(&url, &link.detour(&url));
    world.respell("[database]", "[database]\nstatement_timeout_ms = 1000\nconnect_timeout_ms = 2000");
    world.serve().await;
    for kind in ["unreachable", "closed", "timeout", "read_only", "too_many_connections", "other"] {
        let page = world.workers[0].get("metrics").await.unwrap().1;
        assert!(page.contains(&store_faults(kind)), "{kind} is not there at zero");
    }
    world.ask(&["first"]).await;
    world.succeeded("first").await;
    (world, link)
}

#[tokio::test]
async fn postgres_that_swallows_everything_is_given_up_and_found_again() {
    let (mut world, link) = behind_a_link_to_postgres().await;
    let (lines, made) = (world.lines(), link.made());
    link.freeze();
    world.ask(&["r1", "r2"]).await;
    world.says("not ready: store").await;
    world.shows(&store_faults("timeout"), 2.0).await;
    // New connections are swallowed as the old ones were.
    world.shows(&store_faults("unreachable"), 8.0).await;
    world.says("not ready: store").await;
    assert!(world.lines() - lines < MOST_LINES, "{} lines", world.lines() - lines);
    assert!(link.made() - made < 100, "{} connections", link.made() - made);
    // The old connections never answer any more: whoever kept them would wait for ever.
    link.open();
    world.says("ready").await;
    world.succeeded("r1").await;
    world.succeeded("r2").await;
    assert!(world.sessions("ingress").await < 1.5, "the consumer is not rebuilt");
    world.finish().await;
}

#[tokio::test]
async fn postgres_that_restarts_is_found_again() {
    let (mut world, link) = behind_a_link_to_postgres().await;
    let lines = world.lines();
    let arn = world.fake.key().await;
    world.fake.fault("ImportKeyMaterial", &arn, Some(1), json!({"kind": "hold"})).await;
    world.publish(request("held", &arn, json!({"source_key_identifier": "payroll"}))).await;
    world.fake.held(1, "ImportKeyMaterial", &arn).await;
    // As a server that stops tells its clients, and then nobody listens.
    world.lock_postgres().await;
    link.close();
    world.fake.release(&arn).await;
    world.ask(&["r1"]).await;
    world.says("not ready: store").await;
    let refused = || async {
        let mut sum = 0.0;
        for kind in ["unreachable", "closed"] {
            sum += world.workers[0].metric(&store_faults(kind)).await;
        }
        (sum >= 8.0).then_some(())
    };
    eventually("faults are counted", refused).await;
    assert!(world.lines() - lines < MOST_LINES, "{} lines", world.lines() - lines);
    world.shows("keyferry_store_connects_failed_total", 1.0).await;
    assert_eq!(world.vhost.ready(JOBS).await, 0, "the message is kept in hand");
    let made = world.workers[0].metric("keyferry_store_connects_total").await;
    assert!(made > 0.5, "the first ones");
    world.unlock_postgres().await;
    link.open();
    world.says("ready").await;
    world.shows("keyferry_store_connects_total", made + 1.0).await;
    for id in ["held", "r1"] {
        world.succeeded(id).await;
    }
    assert!(world.sessions("ingress").await < 1.5, "the consumer is not rebuilt");
    world.finish().await;
}

/// A failover as clients see it: the server that they are connected to takes no writes any more, and another does.
#[tokio::test]
async fn postgres_that_takes_no_writes_is_left_for_one_that_does() {
    let mut world = World::new(Tuning::default()).await;
    world.symmetric_key("payroll").await;
    world.serve().await;
    let database: String = world.client.query_one("select current_database()::text", &[]).await.unwrap().get(0);
    let of_worker = format!("alter role keyferry_worker in database {database}");
    let set = format!("{of_worker} set default_transaction_read_only = on");
    world.client.batch_execute(&set).await.unwrap();
    let end = "select pg_terminate_backend(pid) from pg_stat_activity
               where datname = current_database() and usename = 'keyferry_worker'";
    world.client.execute(end, &[]).await.unwrap();
    let lines = world.lines();
    world.ask(&["r1", "r2"]).await;
    world.says("not ready: store").await;
    world.shows(&store_faults("read_only"), 8.0).await;
    // Reading works; that is not enough.
    assert_eq!(world.workers[0].ready().await.unwrap().1.trim(), "not ready: store");
    assert!(world.lines() - lines < MOST_LINES, "{} lines", world.lines() - lines);
    // Only connections that are made from now on can write: the worker has to let go of those that it has.
    world.client.batch_execute(&format!("{of_worker} reset default_transaction_read_only")).await.unwrap();
    world.says("ready").await;
    for id in ["r1", "r2"] {
        world.succeeded(id).await;
    }
    let read_only = world.workers[0].metric(&store_faults("read_only")).await;
    world.ask(&["r3"]).await;
    world.succeeded("r3").await;
    let now = world.workers[0].metric(&store_faults("read_only")).await;
    assert!(now < read_only + 0.5, "connections that cannot write are still used");
    assert!(world.sessions("ingress").await < 1.5, "the consumer is not rebuilt");
    world.finish().await;
}

#[tokio::test]
async fn postgres_without_a_free_connection_is_waited_for() {
    let mut world = World::new(Tuning::default()).await;
    world.symmetric_key("payroll").await;
    world.serve().await;
    let database: String = world.client.query_one("select current_database()::text", &[]).await.unwrap().get(0);
    let limit = |connections: i32| format!("alter database {database} connection limit {connections}");
    let end = "select pg_terminate_backend(pid) from pg_stat_activity
               where datname = current_database() and usename = 'keyferry_worker'";
    world.client.batch_execute(&limit(0)).await.unwrap();
    world.client.execute(end, &[]).await.unwrap();
    let lines = world.lines();
    world.ask(&["r1", "r2"]).await;
    world.says("not ready: store").await;
    world.shows(&store_faults("too_many_connections"), 8.0).await;
    assert!(world.lines() - lines < MOST_LINES, "{} lines", world.lines() - lines);
    // Fewer than the pool would like to have are enough to go on.
    world.client.batch_execute(&limit(2)).await.unwrap();
    for id in ["r1", "r2"] {
        world.succeeded(id).await;
    }
    world.client.batch_execute(&limit(-1)).await.unwrap();
    world.says("ready").await;
    world.ask(&["r3"]).await;
    world.succeeded("r3").await;
    assert!(world.sessions("ingress").await < 1.5, "the consumer is not rebuilt");
    world.finish().await;
}

/// Of the sessions of a worker: each temporary file that they make is on a disk that is full. Removed when it is dropped.
struct FullDisk(PathBuf);

impl FullDisk {
    async fn of(world: &World) -> Self {
        let directory: String = world.client.query_one("show data_directory", &[]).await.unwrap().get(0);
        // Made by the first sort that does not fit into memory.
        let spill = "set work_mem = '64kB'; select max(n) from (select n from generate_series(1, 100000) as n
                     order by -n offset 0) as spilt; reset work_mem";
        world.client.batch_execute(spill).await.unwrap();
        Self(PathBuf::from(directory).join("base/pgsql_tmp"))
    }

    /// Also of sessions that were made since.
    async fn fill(&self, world: &World) {
        let sessions =
            "select pid from pg_stat_activity where datname = current_database() and usename = 'keyferry_worker'";
        for row in world.client.query(sessions, &[]).await.unwrap() {
            for n in 0..100 {
                let file = self.0.join(format!("pgsql_tmp{}.{n}", row.get::<_, i32>(0)));
                // It may be there, made by us.
                drop(std::os::unix::fs::symlink("/dev/full", file));
            }
        }
    }
}

impl Drop for FullDisk {
    fn drop(&mut self) {
        for file in std::fs::read_dir(&self.0).unwrap().flatten() {
            // Those of other tests' sorts are files.
            if file.file_type().is_ok_and(|kind| kind.is_symlink()) {
                drop(std::fs::remove_file(file.path()));
            }
        }
    }
}

/// Nothing is to be done, and so nothing is written that could fail.
#[tokio::test]
async fn an_idle_worker_is_not_ready_while_postgres_has_no_room() {
    let mut world = World::with_worker(Tuning::default()).await;
    world.symmetric_key("payroll").await;
    let lines = world.lines();
    let full = FullDisk::of(&world).await;
    eventually("/readyz says so", || async {
        full.fill(&world).await;
        let (_, body) = world.workers[0].ready().await?;
        (body.trim() == "not ready: store").then_some(())
    })
    .await;
    assert!(world.workers[0].metric(&store_faults("disk_full")).await >= 1.0);
    drop(full);
    world.says("ready").await;
    assert!(world.lines() - lines < MOST_LINES, "{} lines", world.lines() - lines);
    world.ask(&["r1"]).await;
    world.succeeded("r1").await;
    world.finish().await;
}

/// No answer of a server that goes in the middle of everything is lost, and none is given twice.
#[tokio::test]
async fn postgres_that_crashes_with_jobs_under_way_loses_none() {
    let postgres = PrivatePostgres::start().await;
    let mut world = World::on(Tuning::hasty(), &postgres).await;
    world.symmetric_key("payroll").await;
    world.respell("[database]", "[database]\nstatement_timeout_ms = 2000\nconnect_timeout_ms = 2000");
    world.serve().await;
    let arns = world.fake.seed(json!({"count": 20})).await;
    for (round, crash) in [Crash::Immediate, Crash::Killed].into_iter().enumerate() {
        let named = json!({"source_key_identifier": "payroll"});
        world.fake.fault("ImportKeyMaterial", &arns[round], Some(1), json!({"kind": "hold"})).await;
        let wave = (0..40).map(|n| request(&format!("r{round}-{n}"), &arns[n % 20], named.clone())).collect();
        world.publish_all(wave).await;
        let ended = format!("select count(*) from job where state <> 'waiting' and request_id like 'r{round}-%'");
        world.fake.held(1, "ImportKeyMaterial", &arns[round]).await;
        eventually("some have ended", || async { (world.count(&ended).await >= 5).then_some(()) }).await;
        postgres.crash(crash).await;
        world.says("not ready: store").await;
        world.fake.release(&arns[round]).await;
        postgres.start_again().await;
        world.client = world.db.client().await;
        world.says("ready").await;
        world.until("all of the wave have succeeded", &format!("{ended} and state = 'succeeded'"), 40).await;
    }
    assert!(world.sessions("ingress").await < 1.5, "the consumer is not rebuilt");
    world.finish().await;
}

#[tokio::test]
async fn a_broker_that_swallows_everything_is_found_out_by_its_heartbeat() {
    let mut world = World::new(Tuning::default()).await;
    world.symmetric_key("payroll").await;
    let url = world.vhost.url();
    let link = Link::to(&url).await;
    world.respell(&url, &format!("{}?heartbeat=2", link.detour(&url)));
    world.respell("[rabbitmq]", "[rabbitmq]\nconnect_timeout_ms = 2000");
    world.serve().await;
    let made = link.made();
    link.freeze();
    // Both sessions are idle: nothing but the missing heartbeat tells.
    world.says("not ready: rabbitmq ingress, events").await;
    for role in ["ingress", "events"] {
        let broken = format!("keyferry_broker_sessions_broken_total{{role=\"{role}\",transport=\"rabbitmq\"}}");
        world.shows(&broken, 1.0).await;
    }
    let lines = world.lines();
    eventually("it is tried again and again", || async { (link.made() >= made + 6).then_some(()) }).await;
    assert!(world.lines() - lines < 60, "{} lines in a few attempts", world.lines() - lines);
    assert!(world.sessions("events").await < world.sessions("ingress").await + 1.5, "no session is opened meanwhile");
    for role in ["ingress", "events"] {
        let failed = format!("keyferry_broker_sessions_failed_total{{role=\"{role}\",transport=\"rabbitmq\"}}");
        world.shows(&failed, 1.0).await;
    }
    // The tests' own connection does not go by the link.
    world.ask(&["r1"]).await;
    link.open();
    world.says("ready").await;
    world.succeeded("r1").await;
    world.finish().await;
}

#[tokio::test]
async fn a_broker_that_is_short_of_memory_is_waited_for_and_one_that_restarts_is_found_again() {
    const BLOCKED: &str = "keyferry_broker_blocked{role=\"events\",transport=\"rabbitmq\"}";
    let broker = PrivateBroker::start().await;
    let mut world = World::beside(Tuning::default(), &broker).await;
    world.symmetric_key("payroll").await;
    // Far shorter than the alarm lasts: a publication that gave up would be seen.
    world.respell("[rabbitmq]", "[rabbitmq]\nconnect_timeout_ms = 3000");
    world.ask(&["r1", "r2", "r3"]).await;
    broker.block(true).await;
    eventually("the alarm", || async { world.vhost.is_short_of_memory().await.then_some(()) }).await;
    world.start("").await;
    // It consumes; its first event blocks the connection that publishes.
    for id in ["r1", "r2", "r3"] {
        world.succeeded(id).await;
    }
    eventually("the queue is empty", || async { (world.vhost.ready(JOBS).await == 0).then_some(()) }).await;
    world.says("not ready: events (blocked by the broker)").await;
    world.shows(BLOCKED, 1.0).await;
    // After the doctor's first publish nothing is read from it any more, its good-bye neither.
    let looked = world.run(&["doctor", "--timeout", "8s", "--json"]).await.json();
    let found = |check: &str| {
        let of_check = looked["checks"].as_array().unwrap().iter().find(|finding| finding["check"] == check);
        of_check.map(|finding| finding["code"].as_str().unwrap().to_owned())
    };
    for check in ["rabbitmq.queue", "rabbitmq.exchange"] {
        assert_eq!(found(check).as_deref(), Some("ok"), "{looked:#}");
    }
    let lines = world.lines();
    // Longer than a relay's lease, by the store's clock: the window stays with the one that has it, whoever else looks.
    let other = world.start("").await;
    eventually("the other worker publishes too, if it is let", || async {
        world.workers[other].ready().await?;
        let opened = "keyferry_broker_sessions_total{role=\"events\",transport=\"rabbitmq\"}";
        (world.workers[other].metric(opened).await >= 1.0).then_some(())
    })
    .await;
    let kept = "select count(*) from outbox where due_at > keyferry_now() + interval '25 s'";
    for _ in 0..3 {
        world.until("the relay keeps its window", kept, 3).await;
        world.db.advance(Duration::from_secs(11)).await;
    }
    world.until("the relay keeps its window", kept, 3).await;
    assert_eq!(world.count("select count(*) from outbox where attempts > 1").await, 0, "another relay took the window");
    assert_eq!(world.workers[0].ready().await.unwrap().1.trim(), "not ready: events (blocked by the broker)");
    assert!(world.count("select count(*) from outbox").await > 0);
    assert!(world.sessions("events").await < 1.5, "a blocked session is not given up");
    assert!(world.lines() - lines < 40, "{} lines in half a minute", world.lines() - lines);
    broker.block(false).await;
    world.until("the events are told", "select count(*) from outbox", 0).await;
    world.says("ready").await;
    assert!(world.workers[0].metric(BLOCKED).await < 0.5);
    assert!(world.sessions("events").await < 1.5);
    for id in ["r1", "r2", "r3"] {
        assert_eq!(world.events_now(id).await.len(), 1, "nothing was published twice");
    }

    // And now it is killed and restarts, with a message in the queue that nobody has taken and one job under way.
    let arn = world.fake.key().await;
    world.fake.fault("ImportKeyMaterial", &arn, Some(1), json!({"kind": "hold"})).await;
    world.publish(request("held", &arn, json!({"source_key_identifier": "payroll"}))).await;
    world.fake.held(1, "ImportKeyMaterial", &arn).await;
    broker.kill().await;
    world.says("not ready: rabbitmq ingress, events").await;
    world.fake.release(&arn).await;
    world.succeeded("held").await;
    let lines = world.lines();
    world.until("its event waits", "select count(*) from outbox", 1).await;
    broker.start_again().await;
    world.says("ready").await;
    assert!(world.lines() - lines < MOST_LINES, "{} lines", world.lines() - lines);
    world.until("the event is told", "select count(*) from outbox", 0).await;
    world.vhost.reopen().await;
    world.ask(&["after"]).await;
    world.succeeded("after").await;
    for role in ["ingress", "events"] {
        let broken = format!("keyferry_broker_sessions_broken_total{{role=\"{role}\",transport=\"rabbitmq\"}}");
        assert!(world.workers[0].metric(&broken).await >= 1.0, "{role}");
    }
    world.finish().await;
}

#[tokio::test]
async fn aws_that_is_away_costs_attempts_and_nothing_else() {
    let mut world = World::new(Tuning::default()).await;
    world.symmetric_key("payroll").await;
    world.environment.push(("AWS_ENDPOINT_URL_KMS", "http://127.0.0.1:1".into()));
    world.serve().await;
    let lines = world.lines();
    world.ask(&["r1", "r2"]).await;
    world.shows("keyferry_aws_calls_total{operation=\"DescribeKey\",result=\"not_sent\"}", 4.0).await;
    // It is one of many that a worker asks: readiness is about what it cannot do without.
    world.says("ready").await;
    assert!(world.lines() - lines < MOST_LINES, "{} lines", world.lines() - lines);
    assert_eq!(world.count("select count(*) from line where late_until is not null").await, 0, "nothing was sent");
    world.workers[0].stop().await;
    world.environment.clear();
    world.serve().await;
    world.db.advance(std::time::Duration::from_secs(61)).await;
    for id in ["r1", "r2"] {
        world.succeeded(id).await;
    }
    world.finish().await;
}
