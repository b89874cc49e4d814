//! The broker is away, empty, or closes the door: the worker says so and comes back by itself.

use crate::support::broker::JOBS;
use crate::support::world::{Tuning, World, request};
use crate::support::{eventually, variable};
use keyferry::amqp::Broker;
use keyferry::config::RabbitMq;
use serde_json::json;
use std::io::Read as _;
use std::net::TcpListener as StdListener;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use url::Url;

/// Waits until `/readyz` says this.
async fn says(world: &World, at: usize, wanted: &str) {
    eventually(&format!("/readyz says {wanted}"), || async {
        let (_, body) = world.workers[at].ready().await?;
        (body.trim() == wanted).then_some(())
    })
    .await;
}

#[tokio::test]
async fn without_queues_it_is_not_ready_until_they_are_made() {
    let mut world = World::without_topology(Tuning::default()).await;
    let at = world.start("").await;
    says(&world, at, "not ready: rabbitmq ingress, events").await;
    assert_eq!(world.workers[at].ready().await.unwrap().0, 503);
    assert_eq!(world.workers[at].get("livez").await.unwrap().0, 200);
    let applied = world.run(&["topology", "apply"]).await;
    assert_eq!(applied.code, Some(0), "{applied:?}");
    says(&world, at, "ready").await;
    world.vhost.open().await;
    let arn = world.fake.key().await;
    world.publish(request("r1", &arn, json!({}))).await;
    world.succeeded("r1").await;
    // And once more while it runs: the queue goes, and comes again.
    world.vhost.delete_queue(JOBS).await;
    says(&world, at, "not ready: rabbitmq ingress").await;
    world.vhost.apply_topology().await;
    says(&world, at, "ready").await;
    world.publish(request("r2", &arn, json!({}))).await;
    world.failed("r2", "source_key_required").await;
    world.finish().await;
}

#[tokio::test]
async fn a_broker_that_comes_later_is_waited_for() {
    let mut world = World::new(Tuning::default()).await;
    // A port on which nobody answers yet.
    let port = StdListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let broker: Url = variable("KEYFERRY_TEST_AMQP").parse().unwrap();
    let settings = std::fs::read_to_string(world.path("keyferry.toml")).unwrap();
    let mut detour: Url = world.vhost.url().parse().unwrap();
    detour.set_port(Some(port)).unwrap();
    world.write("keyferry.toml", &settings.replace(&world.vhost.url(), detour.as_str()));
    let at = world.start("").await;
    says(&world, at, "not ready: rabbitmq ingress, events").await;
    let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
    let target = ("127.0.0.1", broker.port().unwrap());
    tokio::spawn(async move {
        while let Ok((mut near, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut far = TcpStream::connect(target).await.unwrap();
                // Either side may go as it likes.
                drop(tokio::io::copy_bidirectional(&mut near, &mut far).await);
            });
        }
    });
    says(&world, at, "ready").await;
    let arn = world.fake.key().await;
    world.publish(request("r1", &arn, json!({}))).await;
    world.succeeded("r1").await;
    world.finish().await;
}

#[tokio::test]
async fn connections_that_the_broker_closes_are_made_again() {
    let mut world = World::with_worker(Tuning::default()).await;
    let arns = world.fake.seed(json!({"count": 3})).await;
    for (number, (arn, connection)) in arns.iter().zip(["", "keyferry ingress", "keyferry events"]).enumerate() {
        if !connection.is_empty() {
            world.vhost.cut_connections(connection).await;
        }
        let id = format!("r{number}");
        world.publish(request(&id, arn, json!({}))).await;
        world.succeeded(&id).await;
        world.until("its event is told", "select count(*) from outbox", 0).await;
    }
    for role in ["ingress", "events"] {
        let sessions = format!("keyferry_broker_sessions_total{{role=\"{role}\",transport=\"rabbitmq\"}}");
        assert!(world.workers[0].metric(&sessions).await >= 2.0, "{role}");
    }
    world.finish().await;
}

#[tokio::test]
async fn an_event_that_nobody_wants_waits_and_delays_no_other() {
    let mut world = World::with_worker(Tuning::default()).await;
    let arns = world.fake.seed(json!({"count": 2})).await;
    // Only successes are wanted, for now.
    world.vhost.bind("job.succeeded.#").await;
    world.vhost.unbind_probe().await;
    world.vhost.unbind("keyferry.events.all", "#").await;
    world.publish(request("unwanted", &arns[0], json!({"source_key_identifier": "no-such-key"}))).await;
    world.failed("unwanted", "source_key_unknown").await;
    world.until("its event is held", "select count(*) from outbox where held_because = 'unroutable'", 1).await;
    world.publish(request("wanted", &arns[1], json!({}))).await;
    world.succeeded("wanted").await;
    world.until("the other event is told", "select count(*) from outbox where held_because is null", 0).await;
    assert_eq!(world.events_of("wanted").await.len(), 1);
    assert_eq!(world.events_of("unwanted").await.len(), 0);
    assert!(world.workers[0].metric("keyferry_events_held_total").await >= 1.0);
    world.vhost.bind("#").await;
    world.db.advance(Duration::from_secs(60)).await;
    world.until("it is told after all", "select count(*) from outbox", 0).await;
    assert_eq!(world.events_of("unwanted").await.len(), 1);
    world.finish().await;
}

/// The broker closes the channel over it, and over whatever is published with it.
#[tokio::test]
async fn an_event_beyond_the_brokers_size_waits_and_delays_no_other() {
    let mut world = World::new(Tuning::default()).await;
    // One window: what is too long stands in its middle.
    let beyond = "
        insert into outbox (event_id, routing_key, body, due_at)
        select gen_random_uuid(), 'job.failed.x',
               '{\"data\":{\"job\":{\"request_id\":\"e' || n || '\"}},\"pad\":\"' ||
                   repeat('x', case n when 3 then 150000 else 10 end) || '\"}',
               keyferry_now()
        from generate_series(1, 6) as n";
    world.client.batch_execute(beyond).await.unwrap();
    let at = world.start("").await;
    world.until("it is held", "select count(*) from outbox where held_because = 'refused by the broker'", 1).await;
    world.until("the others are told", "select count(*) from outbox where held_because is null", 0).await;
    for n in [1, 2, 4, 5, 6] {
        assert!(!world.events_of(&format!("e{n}")).await.is_empty(), "e{n}");
    }
    assert!(world.events_of("e3").await.is_empty());
    assert!(world.workers[at].metric("keyferry_events_held_total").await >= 1.0);
    // It is tried again, and harms nobody then either.
    world.db.advance(Duration::from_secs(600)).await;
    let arn = world.fake.key().await;
    world.publish(request("r1", &arn, json!({}))).await;
    world.succeeded("r1").await;
    assert_eq!(world.events_of("r1").await.len(), 1);
    world.until("it was tried again", "select count(*) from outbox where attempts >= 2", 1).await;
    // Not judged by the checker: these events are told by no job.
}

#[tokio::test]
async fn while_postgres_is_away_messages_are_kept_in_hand() {
    let mut world = World::with_worker(Tuning::default()).await;
    let arns = world.fake.seed(json!({"count": 3})).await;
    // One job is in the middle of its import.
    world.fake.fault("ImportKeyMaterial", &arns[0], Some(1), json!({"kind": "hold"})).await;
    world.publish(request("r0", &arns[0], json!({}))).await;
    world.fake.held(1, "ImportKeyMaterial", &arns[0]).await;
    world.lock_postgres().await;
    world.publish(request("r1", &arns[1], json!({}))).await;
    says(&world, 0, "not ready: store").await;
    world.fake.release(&arns[0]).await;
    world.fake.wait(1, &format!("key={}&effect=imported", arns[0])).await;
    world.publish(request("r2", &arns[2], json!({}))).await;
    world.unlock_postgres().await;
    for id in ["r0", "r1", "r2"] {
        world.succeeded(id).await;
    }
    says(&world, 0, "ready").await;
    let sessions =
        world.workers[0].metric("keyferry_broker_sessions_total{role=\"ingress\",transport=\"rabbitmq\"}").await;
    assert!(sessions < 1.5, "the consumer is not rebuilt for an outage of Postgres");
    world.finish().await;
}

#[tokio::test]
async fn connections_that_postgres_closes_are_made_again() {
    let mut world = World::with_worker(Tuning::default()).await;
    let arns = world.fake.seed(json!({"count": 20})).await;
    let end = "select pg_terminate_backend(pid) from pg_stat_activity
               where datname = current_database() and usename = 'keyferry_worker'";
    for (number, arn) in arns.iter().enumerate() {
        world.publish(request(&format!("r{number}"), arn, json!({}))).await;
        if number % 4 == 0 {
            world.client.execute(end, &[]).await.unwrap();
        }
    }
    for number in 0..arns.len() {
        world.succeeded(&format!("r{number}")).await;
    }
    world.finish().await;
}

/// lapin built without TLS takes an `amqps` URL and speaks in the clear.
#[tokio::test]
async fn amqps_begins_with_a_tls_handshake() {
    let listener = StdListener::bind("127.0.0.1:0").unwrap();
    let url = format!("amqps://user:password@{}/%2f", listener.local_addr().unwrap());
    let first = tokio::task::spawn_blocking(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut record = [0; 6];
        stream.read_exact(&mut record).unwrap();
        record
    });
    let broker = Broker::new(&RabbitMq::default(), &url).unwrap();
    let connecting = tokio::spawn(async move { broker.connect("tests").await.is_ok() });
    let record = first.await.unwrap();
    // A handshake record (22) of TLS 1.x that begins with ClientHello (1): RFC 8446, 5.1 and 4.
    assert_eq!((record[0], record[1], record[5]), (22, 3, 1), "{record:?}");
    assert!(!connecting.await.unwrap(), "nobody shook hands");
}
