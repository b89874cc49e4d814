//! The dsm tier with servers that are away, slow, silent or unsound, and how many jobs share few connections.

use crate::dsm_source::USABLE;
use crate::support::kmip::{
    Act, Double, GET, Line, Tier, address, aes, attributes, done, file, found, hasty, message, settings, structure,
    text,
};
use crate::support::{eventually, variable};
use keyferry::config::DsmConnection;
use keyferry::job::KeyKind;
use keyferry::retry::Class;
use keyferry::source::DsmError;
use rustix::process::{Pid, Signal, kill_process_group};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

use KeyKind::SymmetricDefault;

#[tokio::test]
async fn nothing_that_a_server_says_is_believed_before_it_is_checked() {
    let deep = (0..8000).rev().flat_map(|depth: u32| [&[0x42, 0, 0x7B, 1][..], &(depth * 8).to_be_bytes()].concat());
    let endless: Vec<u8> = deep.collect();
    let whole = message(&[attributes("1"), aes("1", &[7; 32])]);
    let mut lying = whole.clone();
    // The first item of the header says that it is longer than everything.
    lying[20..24].copy_from_slice(&0x7FFF_FFF8_u32.to_be_bytes());
    let mut longer = whole.clone();
    longer[4..8].copy_from_slice(&u32::try_from(whole.len()).unwrap().to_be_bytes());
    let huge = [0x42, 0, 0x7B, 1, 0xFF, 0xFF, 0xFF, 0xF8].to_vec();
    let many = structure(0x42_007B, &vec![structure(0x42_000F, &[]); 5000]);
    let other = message(&[attributes("1"), aes("2", &[7; 32])]);
    let of_another = message(&[attributes("2"), aes("1", &[7; 32])]);
    for (what, bytes, code) in [
        ("garbage", vec![0xA5; 4096], "dsm_protocol"),
        ("text", b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(), "dsm_protocol"),
        ("endless nesting", endless, "dsm_protocol"),
        ("a length that reaches outside", lying, "dsm_protocol"),
        ("a length that nothing follows", longer, "dsm_unavailable"),
        ("a length of 4 GiB", huge, "dsm_protocol"),
        ("too many items", many, "dsm_protocol"),
        ("no answer at all", message(&[]), "dsm_protocol"),
        ("an answer to something else", message(&[found(&["1"]), found(&["1"])]), "dsm_protocol"),
        ("another object", other, "source_key_damaged"),
        ("another object's attributes", of_another, "source_key_damaged"),
        (
            "an object without a key",
            message(&[attributes("1"), done(GET, &[text(0x42_0094, "1")])]),
            "source_key_damaged",
        ),
    ] {
        let double = Double::start(move |_| Act::Leave(bytes.clone())).await;
        let error = Tier::new(settings(&[&double.address], "client")).fault("1").await;
        assert_eq!(error.code(), code, "{what}: {error}");
    }
    let double = Double::start(move |_| Act::Answer(whole.clone())).await;
    assert!(Tier::new(settings(&[&double.address], "client")).fetch("1", SymmetricDefault).await.is_ok());
    // And of what is no TLS at all.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let plain = listener.local_addr().unwrap().to_string();
    let server = tokio::spawn(async move {
        let (mut tcp, _) = listener.accept().await.unwrap();
        drop(tokio::io::AsyncWriteExt::write_all(&mut tcp, b"220 mail.example ESMTP\r\n").await);
        tcp
    });
    // A load balancer may say so until its servers are back.
    let error = Tier::new(settings(&[&plain], "client")).fault("1").await;
    assert!(error.retry() == Some(Class::Transient) && error.to_string().contains("does not speak TLS"), "{error}");
    drop(server.await);
}

#[tokio::test]
async fn a_server_that_is_slow_byte_by_byte_is_given_up_in_time() {
    let answer = message(&[attributes("1"), aes("1", &[7; 32])]);
    let double = Double::start(move |_| Act::Drip(answer.clone(), Duration::from_millis(50))).await;
    let hasty = DsmConnection { request_timeout_ms: 400, ..settings(&[&double.address], "client") };
    let started = Instant::now();
    let error = Tier::new(hasty).fault("1").await;
    assert!(error.code() == "dsm_unavailable" && error.retry() == Some(Class::Transient), "{error}");
    assert!(error.to_string().contains("400 ms"), "{error}");
    assert!((Duration::from_millis(400)..Duration::from_secs(3)).contains(&started.elapsed()));
    // A server that takes the connection and says nothing: TLS has its own time.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent = listener.local_addr().unwrap().to_string();
    let hasty = DsmConnection { connect_timeout_ms: 300, ..settings(&[&silent], "client") };
    let error = Tier::new(hasty).fault("1").await;
    assert!(error.to_string().contains("TLS handshake within 300 ms"), "{error}");
}

#[tokio::test]
async fn a_server_that_is_away_is_left_alone_for_a_while_and_then_asked_again() {
    let line = Line::to(address()).await;
    let tier = Tier::new(hasty(&[&line.address]));
    assert!(tier.fetch("aes-256", SymmetricDefault).await.is_ok());
    line.cut();
    let error =
        eventually("the cut is noticed", || async { tier.fetch("aes-256", SymmetricDefault).await.err() }).await;
    assert!(error.code() == "dsm_unavailable" && error.retry().is_some(), "{error}");
    let up = format!("keyferry_dsm_server_up{{connection=\"prod\",server=\"{}\"}}", line.address);
    assert!(tier.metric(&up) < 0.5);
    line.mend();
    eventually("it is asked again", || async { tier.fetch("aes-256", SymmetricDefault).await.ok() }).await;
    assert!(tier.metric(&up) > 0.5);
}

#[tokio::test]
async fn a_connection_that_was_closed_while_idle_costs_nothing_but_a_new_one() {
    let line = Line::to(address()).await;
    let tier = Tier::new(settings(&[&line.address], "client"));
    for round in 1..=3_u32 {
        assert!(tier.fetch("aes-256", SymmetricDefault).await.is_ok());
        line.cut();
        // Until the cut has reached the client, a request may still be under way to nowhere.
        tokio::time::sleep(Duration::from_millis(50)).await;
        line.mend();
        assert!(tier.fetch("aes-256", SymmetricDefault).await.is_ok());
        let reconnects = tier.metric("keyferry_dsm_reconnects_total{connection=\"prod\"}");
        assert!((reconnects - f64::from(round)).abs() < 0.5, "{reconnects}");
    }
}

#[tokio::test]
async fn a_session_that_went_silent_while_idle_is_no_fault_of_the_server() {
    let answer = message(&[attributes("1"), aes("1", &[7; 32])]);
    let double = Double::start(move |asked| match (asked.connection, asked.request) {
        (0, 2..) => Act::Hang,
        _ => Act::Answer(answer.clone()),
    })
    .await;
    let tier = Tier::new(DsmConnection { request_timeout_ms: 1_000, ..settings(&[&double.address], "client") });
    for _ in 0..3 {
        assert!(tier.fetch("1", SymmetricDefault).await.is_ok());
    }
    assert_eq!(double.connections(), 2);
    assert!(tier.metric("keyferry_dsm_reconnects_total{connection=\"prod\"}") > 0.5);
}

#[tokio::test]
async fn one_bad_answer_is_the_fault_of_one_job_alone() {
    let double = Double::start(|asked| match asked.ids.first().map(String::as_str) {
        Some("666") => Act::Answer([0x42, 0, 0x7B, 1, 0xFF, 0xFF, 0xFF, 0xF8].to_vec()),
        _ => Act::Answer(message(&[attributes("1"), aes("1", &[7; 32])])),
    })
    .await;
    let tier = Arc::new(Tier::new(settings(&[&double.address], "client")));
    let mut jobs = JoinSet::new();
    for at in 0..64 {
        let tier = Arc::clone(&tier);
        jobs.spawn(async move {
            if at % 2 == 0 {
                let error = tier.fault("666").await;
                assert!(error.code() == "dsm_protocol" && error.retry().is_none(), "{error}");
            } else if let Err(error) = tier.fetch("1", SymmetricDefault).await {
                panic!("{error}");
            }
        });
    }
    while let Some(ended) = jobs.join_next().await {
        ended.unwrap();
    }
    let up = format!("keyferry_dsm_server_up{{connection=\"prod\",server=\"{}\"}}", double.address);
    assert!(tier.metric(&up) > 0.5);
}

#[tokio::test]
async fn a_server_that_swallows_everything_holds_nobody_for_longer_than_one_connect_time_out() {
    // Nobody accepts: the kernel does, and says nothing.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let hole = listener.local_addr().unwrap().to_string();
    let tier = Arc::new(Tier::new(DsmConnection { connect_timeout_ms: 1_000, ..settings(&[&hole], "client") }));
    // At first nobody knows; then it is left alone.
    for most in [Duration::from_millis(3_000), Duration::from_millis(900)] {
        let started = Instant::now();
        let mut jobs = JoinSet::new();
        for _ in 0..64 {
            let tier = Arc::clone(&tier);
            jobs.spawn(async move { tier.fault("1").await });
        }
        while let Some(ended) = jobs.join_next().await {
            let error = ended.unwrap();
            assert!(matches!(error, DsmError::Unavailable { .. }) && error.retry().is_some(), "{error}");
            assert!(error.to_string().contains("1000 ms"), "{error}");
        }
        assert!(started.elapsed() < most, "{:?}", started.elapsed());
    }
}

/// A PyKMIP of one's own, without any object.
struct Restarted {
    child: Option<Child>,
    directory: tempfile::TempDir,
    address: String,
}

impl Restarted {
    fn new() -> Self {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        std::fs::create_dir(path.join("policy")).unwrap();
        let settings = format!(
            "[server]\nhostname = 127.0.0.1\nport = {port}\ncertificate_path = {}\nkey_path = {}\nca_path = {}\n\
             auth_suite = TLS1.2\npolicy_path = {}\ndatabase_path = {}\n",
            file("server.crt").display(),
            file("server.key").display(),
            file("ca.crt").display(),
            path.join("policy").display(),
            path.join("database").display(),
        );
        std::fs::write(path.join("server.conf"), settings).unwrap();
        Self { child: None, directory, address: format!("127.0.0.1:{port}") }
    }

    fn start(&mut self) {
        use std::os::unix::process::CommandExt as _;
        let program = std::path::PathBuf::from(variable("KEYFERRY_TEST_PYTHON")).with_file_name("pykmip-server");
        let path = self.directory.path();
        let mut command = Command::new(program);
        command.arg("-f").arg(path.join("server.conf")).arg("-l").arg(path.join("server.log"));
        // It has children of its own.
        command.process_group(0).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.child = Some(command.spawn().unwrap());
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have gone by itself.
            let _gone = kill_process_group(Pid::from_child(&child), Signal::KILL).is_err();
            drop(child.wait());
        }
    }
}

impl Drop for Restarted {
    fn drop(&mut self) {
        self.kill();
    }
}

#[tokio::test]
async fn a_server_may_be_killed_and_started_again() {
    let mut server = Restarted::new();
    let tier = Tier::new(hasty(&[&server.address]));
    for _ in 0..2 {
        assert_eq!(tier.fault("aes-256").await.code(), "dsm_unavailable");
        server.start();
        // It has no keys: that it says so is what is waited for.
        eventually("it answers", || async {
            (tier.fault("aes-256").await.code() == "source_key_unknown").then_some(())
        })
        .await;
        server.kill();
        eventually("it is gone", || async { (tier.fault("aes-256").await.code() == "dsm_unavailable").then_some(()) })
            .await;
    }
}

#[tokio::test]
async fn a_server_that_breaks_off_in_mid_answer_is_asked_again() {
    let answer = message(&[attributes("1"), aes("1", &[7; 32])]);
    let half = answer[..answer.len() / 2].to_vec();
    // The third request overall, on a connection that served two.
    let double = Double::start(move |asked| match (asked.connection, asked.request) {
        (0, 3) => Act::Leave(half.clone()),
        _ => Act::Answer(answer.clone()),
    })
    .await;
    let tier = Tier::new(settings(&[&double.address], "client"));
    for _ in 0..5 {
        assert_eq!(tier.fetch("1", SymmetricDefault).await.unwrap().key.material().expose(), [7; 32]);
    }
    assert_eq!(double.connections(), 2);
    // One that always does so is unavailable, after a bounded number of tries.
    let double = Double::start(|_| Act::Leave(vec![0x42, 0])).await;
    let error = Tier::new(settings(&[&double.address], "client")).fault("1").await;
    assert!(error.code() == "dsm_unavailable" && double.connections() <= 2, "{error} {}", double.connections());
}

#[tokio::test]
async fn the_next_server_takes_over_and_the_first_is_preferred_again() {
    let (first, second) = (Line::to(address()).await, Line::to(address()).await);
    let tier = Tier::new(hasty(&[&first.address, &second.address]));
    assert!(tier.fetch("aes-256", SymmetricDefault).await.is_ok());
    assert_eq!((first.most(), second.most()), (1, 0));
    first.cut();
    tokio::time::sleep(Duration::from_millis(50)).await;
    for _ in 0..20 {
        assert!(tier.fetch("aes-256", SymmetricDefault).await.is_ok());
    }
    assert_eq!(second.most(), 1);
    first.mend();
    second.cut();
    tokio::time::sleep(Duration::from_millis(50)).await;
    eventually("the first is asked again", || async { tier.fetch("aes-256", SymmetricDefault).await.ok() }).await;
    // So is one that talks nonsense, on one that does not.
    let double = Double::start(|_| Act::Answer(vec![0xA5; 64])).await;
    let tier = Tier::new(settings(&[&double.address, &address()], "client"));
    assert!(tier.fetch("aes-256", SymmetricDefault).await.is_ok());
    // One that is away is passed over, and named when there is no other.
    let dead = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let tier = Tier::new(settings(&[&dead, &address()], "client"));
    assert!(tier.fetch("aes-256", SymmetricDefault).await.is_ok());
    let error = Tier::new(settings(&[&dead], "client")).fault("aes-256").await;
    assert!(error.to_string().contains(&dead), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_jobs_share_few_connections() {
    let line = Line::to(address()).await;
    let shared = settings(&[&line.address], "client");
    let tier = Arc::new(Tier::new(DsmConnection { max_connections: 3, request_timeout_ms: 20_000, ..shared }));
    let mut jobs = JoinSet::new();
    for at in 0..64 {
        let tier = Arc::clone(&tier);
        jobs.spawn(async move {
            let (label, kind) = USABLE[at % USABLE.len()];
            tier.fetch(label, kind).await.unwrap_or_else(|error| panic!("{label}: {error}"));
        });
    }
    while let Some(ended) = jobs.join_next().await {
        ended.unwrap();
    }
    assert!((1..=3).contains(&line.most()), "{}", line.most());
    let open = tier.metric("keyferry_dsm_connections{connection=\"prod\"}");
    assert!((1.0..=3.0).contains(&open), "{open}");
    let gets = tier.metric("keyferry_dsm_requests_total{connection=\"prod\",operation=\"get\",outcome=\"ok\"}");
    assert!(gets >= 64.0, "{gets}");
}

#[tokio::test]
async fn jobs_wait_in_line_for_no_longer_than_a_request_may_take() {
    let double = Double::start(|_| Act::Hang).await;
    let narrow =
        DsmConnection { max_connections: 1, request_timeout_ms: 500, ..settings(&[&double.address], "client") };
    let tier = Arc::new(Tier::new(narrow));
    let holder = tokio::spawn({
        let tier = Arc::clone(&tier);
        async move { tier.fault("1").await }
    });
    eventually("it is asked", || async { (double.requests() > 1).then_some(()) }).await;
    let started = Instant::now();
    // Either the line or, right after the holder's end, the server's absence.
    let error = tier.fault("1").await;
    assert!(error.code() == "dsm_unavailable" && started.elapsed() < Duration::from_secs(3), "{error}");
    assert_eq!(holder.await.unwrap().code(), "dsm_unavailable");
}

#[tokio::test]
async fn a_job_that_goes_away_leaves_no_half_read_connection_behind() {
    let answer = message(&[attributes("1"), aes("1", &[7; 32])]);
    let double = Double::start(move |asked| match asked.connection {
        0 => Act::Hang,
        _ => Act::Answer(answer.clone()),
    })
    .await;
    let tier = Tier::new(settings(&[&double.address], "client"));
    let given_up = tokio::time::timeout(Duration::from_millis(300), tier.fetch("1", SymmetricDefault)).await;
    assert!(given_up.is_err());
    assert!(tier.metric("keyferry_dsm_connections{connection=\"prod\"}") < 0.5);
    assert!(tier.fetch("1", SymmetricDefault).await.is_ok());
    assert_eq!(double.connections(), 2);
}
