//! Traces: what a collector is told of a job whose message brought a trace. Only with the feature `otlp`.

use crate::support::broker::Message;
use crate::support::eventually;
use crate::support::world::{Tuning, World, request};
use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::routing::post;
use serde_json::json;
use std::sync::{Arc, Mutex};

type Bodies = Arc<Mutex<Vec<u8>>>;

/// Keeps all that it is sent, and answers as collectors do.
async fn collector() -> (String, Bodies) {
    let bodies = Bodies::default();
    let keep =
        |State(bodies): State<Bodies>, body: Bytes| async move { bodies.lock().unwrap().extend_from_slice(&body) };
    let router = Router::new().route("/v1/traces", post(keep)).with_state(Arc::clone(&bodies));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, router).await });
    (url, bodies)
}

/// Whether bytes are in what was sent: ids are as they are in protobuf, texts too.
fn has(bodies: &Bodies, wanted: &[u8]) -> bool {
    bodies.lock().unwrap().windows(wanted.len()).any(|part| part == wanted)
}

#[tokio::test]
async fn an_attempt_and_its_steps_belong_to_the_messages_trace() {
    let (url, bodies) = collector().await;
    let mut world = World::new(Tuning::default()).await;
    world.environment.push(("OTEL_EXPORTER_OTLP_ENDPOINT", url));
    world.serve().await;
    let bytes = world.symmetric_key("payroll").await;
    let arn = world.fake.key().await;
    let (trace, parent) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
    let body = request("r1", &arn, json!({"source_key_identifier": "payroll"})).to_string().into_bytes();
    let message = Message { body, ..Message::default() }.with("traceparent", &format!("00-{trace}-{parent}-01"));
    world.send(message).await;
    let job = world.succeeded("r1").await;
    // What is left is exported before the process ends.
    world.workers[0].stop().await;
    eventually("the collector has it", || async { has(&bodies, b"attempt").then_some(()) }).await;
    for wanted in
        [&hex::decode(trace).unwrap()[..], &hex::decode(parent).unwrap(), job.id.to_string().as_bytes(), arn.as_bytes()]
    {
        assert!(has(&bodies, wanted), "{}", String::from_utf8_lossy(wanted));
    }
    for step in ["parameters", "prepare", "wrap", "import", "verify"] {
        assert!(has(&bodies, step.as_bytes()), "{step}");
    }
    assert!(!has(&bodies, &bytes) && !has(&bodies, hex::encode(&bytes).as_bytes()));
    world.serve().await;
    world.finish().await;
}
