//! The dsm tier against PyKMIP, and against a double for what no sound server does.

use crate::support::kmip::{
    Act, DISCOVER_VERSIONS, Double, GET, GET_ATTRIBUTES, LOCATE, Line, Tier, address, aes, attributes, done,
    enumeration, file, found, message, refused, registered, settings, structure, text, ttlv, versions,
};
use crate::support::{eventually, keyferry, variable};
use keyferry::config::{DsmConnection, DsmProtocol};
use keyferry::job::{DsmKeyRef, KeyKind};
use keyferry::retry::Class;
use keyferry::source::{Dsm, DsmError, KeyMaterial, PlainKey};
use keyferry::telemetry::Metrics;
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::Value;
use std::collections::BTreeMap;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

use KeyKind::{
    EccNistP256, EccNistP384, EccNistP521, EccSecgP256k1, Hmac224, Hmac256, Hmac384, Hmac512, Rsa2048, Rsa3072,
    Rsa4096, SymmetricDefault,
};

/// What can be used, and as what.
const USABLE: [(&str, KeyKind); 20] = [
    ("aes-256", SymmetricDefault),
    ("exportable", SymmetricDefault),
    ("hmac-224", Hmac224),
    ("hmac-256", Hmac256),
    ("hmac-384", Hmac384),
    ("hmac-512", Hmac512),
    ("secret-data", Hmac256),
    ("rsa-2048", Rsa2048),
    ("rsa-2048-pkcs1", Rsa2048),
    ("rsa-2048-raw", Rsa2048),
    ("rsa-3072", Rsa3072),
    ("rsa-4096", Rsa4096),
    ("p256", EccNistP256),
    ("p256-sec1", EccNistP256),
    ("p384", EccNistP384),
    ("p384-sec1", EccNistP384),
    ("p521", EccNistP521),
    ("p521-sec1", EccNistP521),
    ("secp256k1", EccSecgP256k1),
    ("secp256k1-sec1", EccSecgP256k1),
];

/// Settings by which a server is soon asked again.
fn hasty(servers: &[&str]) -> DsmConnection {
    DsmConnection { connect_timeout_ms: 500, ..settings(servers, "client") }
}

#[tokio::test]
async fn every_kind_of_key_is_fetched_in_every_version_by_name_and_identifier() {
    for (protocol, version) in
        [(DsmProtocol::Auto, "2.0"), (DsmProtocol::V1_2, "1.2"), (DsmProtocol::V1_4, "1.4"), (DsmProtocol::V2_0, "2.0")]
    {
        let tier = Tier::new(DsmConnection { protocol, ..settings(&[&address()], "client") });
        let (_, servers) = tier.dsm.check(None).await.unwrap();
        assert_eq!(servers[0].outcome.as_ref().unwrap().kmip_version, version);
        for (label, kind) in USABLE {
            let (id, holds) = registered(label);
            let wanted = PlainKey::parse(kind, KeyMaterial::new(holds)).unwrap();
            let references = [label.to_owned(), id.clone(), format!("prod/{label}")];
            for reference in &references[..if protocol == DsmProtocol::Auto { 3 } else { 1 }] {
                let fetched = tier.fetch(reference, kind).await.unwrap_or_else(|error| panic!("{label}: {error}"));
                assert_eq!(fetched.key.material().expose(), wanted.material().expose(), "{label}");
                assert_eq!(fetched.key.public_key(), wanted.public_key(), "{label}");
                assert_eq!((fetched.connection.as_str(), &fetched.unique_identifier), ("prod", &id));
                assert_eq!(fetched.name.as_deref(), Some(label));
            }
        }
    }
}

#[tokio::test]
async fn what_cannot_be_used_is_refused_for_what_it_is() {
    let tier = Tier::usual();
    for (key, kind, code, says) in [
        ("no-such-key", SymmetricDefault, "source_key_unknown", "no-such-key"),
        ("999999", SymmetricDefault, "source_key_unknown", "999999"),
        ("destroyed", SymmetricDefault, "source_key_unknown", "destroyed"),
        ("of-another", SymmetricDefault, "source_key_unknown", "of-another"),
        ("pre-active", SymmetricDefault, "source_key_wrong_state", "Pre-Active"),
        ("deactivated", SymmetricDefault, "source_key_wrong_state", "Deactivated"),
        ("compromised", SymmetricDefault, "source_key_wrong_state", "Compromised"),
        ("only-derives", SymmetricDefault, "source_key_wrong_usage", "0x200"),
        ("wrapped", SymmetricDefault, "source_key_wrapped", "wrapped under another key"),
        ("aes-128", SymmetricDefault, "source_key_wrong_kind", "128 bits"),
        ("aes-256", Hmac256, "source_key_wrong_kind", "AES"),
        ("hmac-256", SymmetricDefault, "source_key_wrong_kind", "HMAC-SHA256"),
        ("secret-data", SymmetricDefault, "source_key_wrong_kind", "secret data"),
        ("secret-data", Hmac512, "material_wrong_length", "64 bytes"),
        ("rsa-2048", Rsa4096, "source_key_wrong_kind", "2048 bits"),
        ("rsa-2048", EccNistP256, "source_key_wrong_kind", "RSA"),
        ("p256", EccSecgP256k1, "source_key_wrong_kind", "NIST P-256"),
        ("broken", EccNistP256, "material_not_pkcs8", "broken"),
    ] {
        let error = tier.fetch(key, kind).await.unwrap_err();
        assert_eq!(error.code(), code, "{key}: {error}");
        assert!(error.to_string().contains(says) && error.retry().is_none(), "{key}: {error}");
    }
    let (one, other) = (registered("twin-1").0, registered("twin-2").0);
    match tier.fault("twin").await {
        DsmError::KeyAmbiguous { mut candidates, more: false, .. } => {
            candidates.sort();
            let mut wanted = [one.clone(), other];
            wanted.sort();
            assert_eq!(candidates, wanted);
        }
        error => panic!("{error}"),
    }
    assert!(tier.fetch(&one, SymmetricDefault).await.is_ok());
}

#[tokio::test]
async fn an_object_of_another_owner_is_not_had() {
    let (id, holds) = registered("of-another");
    let error = Tier::usual().fault(&id).await;
    assert_eq!((error.code(), error.retry().is_some()), ("dsm_denied", false), "{error}");
    let others = Tier::new(settings(&[&address()], "other"));
    let fetched = others.fetch("of-another", SymmetricDefault).await.unwrap();
    assert_eq!(fetched.key.material().expose(), holds);
}

#[tokio::test]
async fn certificates_are_looked_at_by_both_sides() {
    let usual = || settings(&[&address()], "client");
    for (settings, code, says) in [
        (DsmConnection { ca_file: file("wrong-ca.crt"), ..usual() }, "dsm_untrusted", "UnknownIssuer"),
        (DsmConnection { server_name: Some("other.example".into()), ..usual() }, "dsm_untrusted", "not valid for name"),
        (settings(&[&address()], "stranger"), "dsm_unauthenticated", "UnknownCA"),
        (settings(&[&address()], "expired"), "dsm_unauthenticated", "CertificateExpired"),
    ] {
        let error = Tier::new(settings).fault("aes-256").await;
        assert_eq!(error.code(), code, "{error}");
        assert!(error.to_string().contains(says), "{error}");
        // Somebody has to renew a certificate: jobs wait for that.
        assert_eq!(error.retry(), Some(Class::Credentials), "{error}");
    }
    // TLS 1.3 tells a client only with the first answer.
    let double = Double::start(|_| Act::Hang).await;
    for client in ["stranger", "expired"] {
        let error = Tier::new(settings(&[&double.address], client)).fault("aes-256").await;
        assert_eq!(error.code(), "dsm_unauthenticated", "{error}");
    }
    let named = DsmConnection { server_name: Some("localhost".into()), ..usual() };
    assert!(Tier::new(named).fetch("aes-256", SymmetricDefault).await.is_ok());
}

#[tokio::test]
async fn a_renewed_certificate_needs_no_restart() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let hand_over = |client: &str| {
        for (from, to) in [("crt", "client.crt"), ("key", "client.key")] {
            std::fs::copy(file(&format!("{client}.{from}")), at(to)).unwrap();
        }
    };
    hand_over("expired");
    let line = Line::to(address()).await;
    let renewed = hasty(&[&line.address]);
    let tier = Tier::new(DsmConnection { cert_file: at("client.crt"), key_file: at("client.key"), ..renewed });
    assert_eq!(tier.fault("aes-256").await.code(), "dsm_unauthenticated");
    hand_over("client");
    eventually("it is let in", || async { tier.fetch("aes-256", SymmetricDefault).await.ok() }).await;
    // Half of a renewal: what was there before is used for new connections.
    std::fs::write(at("client.crt"), "-----BEGIN").unwrap();
    line.cut();
    tokio::time::sleep(Duration::from_millis(50)).await;
    line.mend();
    assert!(tier.fetch("aes-256", SymmetricDefault).await.is_ok());
}

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

#[tokio::test]
async fn errors_and_series_are_about_the_server_that_was_asked() {
    let double = Double::start(|_| Act::Answer(message(&[found(&["a\u{7}"])]))).await;
    let dead = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let tier = Tier::new(settings(&[&dead, &double.address, "127.0.0.1:2"], "client"));
    let error = tier.fault("some-name").await;
    assert_eq!(error.code(), "dsm_protocol", "{error}");
    assert!(error.to_string().contains(&double.address) && !error.to_string().contains(&dead), "{error}");
    let up = |server: &str| format!("keyferry_dsm_server_up{{connection=\"prod\",server=\"{server}\"}}");
    assert!(tier.metric(&up(&dead)) < 0.5 && tier.metric(&up(&double.address)) > 0.5);
    // One that was never asked is not down.
    assert!(!tier.metrics.render().unwrap().contains("127.0.0.1:2"));
}

#[tokio::test]
async fn an_identifier_that_no_row_could_hold_is_not_taken() {
    for id in ["i".repeat(257), String::new(), "schl\u{fc}ssel".into(), "a\nb".into()] {
        let answer = message(&[found(&[&id])]);
        let double = Double::start(move |_| Act::Answer(answer.clone())).await;
        let error = Tier::new(settings(&[&double.address], "client")).fault("some-name").await;
        assert!(error.code() == "dsm_protocol" && error.to_string().contains("unique identifier"), "{error}");
    }
}

#[tokio::test]
async fn a_name_never_stands_in_for_an_identifier() {
    // "7" is the name of "2", and no identifier; "ks-1" is the name of "2", and the identifier of another.
    let double = Double::start(|asked| {
        Act::Answer(match (asked.operations.as_slice(), asked.ids.first().map(String::as_str)) {
            ([LOCATE], _) => message(&[found(&["2"])]),
            ([GET_ATTRIBUTES], Some("ks-1")) => message(&[attributes("ks-1")]),
            ([GET_ATTRIBUTES, GET], Some("2")) => message(&[attributes("2"), aes("2", &[7; 32])]),
            _ => message(&[refused(Some(GET_ATTRIBUTES), 1)]),
        })
    })
    .await;
    let tier = Tier::new(settings(&[&double.address], "client"));
    for key in ["7", "payroll"] {
        assert_eq!(tier.fetch(key, SymmetricDefault).await.unwrap().unique_identifier, "2", "{key}");
        // What was chosen by identifier is that or nothing.
        let error = tier.dsm.fetch_exact("prod", key, SymmetricDefault).await.unwrap_err();
        assert_eq!(error.code(), "source_key_unknown", "{error}");
    }
    assert_eq!(tier.dsm.fetch_exact("prod", "2", SymmetricDefault).await.unwrap().unique_identifier, "2");
    match tier.fault("ks-1").await {
        DsmError::KeyAmbiguous { candidates, more: false, .. } => assert_eq!(candidates, ["2", "ks-1"]),
        error => panic!("{error}"),
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

#[tokio::test]
async fn a_warm_fetch_is_one_round_trip_and_a_moved_name_is_followed() {
    let now = Arc::new(std::sync::Mutex::new(("1", 1_u8)));
    let says = Arc::clone(&now);
    let double = Double::start(move |asked| {
        let (id, byte) = *says.lock().unwrap();
        Act::Answer(match asked.operations.as_slice() {
            [LOCATE] => message(&[found(&[id])]),
            [GET_ATTRIBUTES] => message(&[refused(Some(GET_ATTRIBUTES), 1)]),
            [LOCATE, GET_ATTRIBUTES, GET] => message(&[found(&[id]), attributes("1"), aes("1", &[1; 32])]),
            _ => message(&[attributes(id), aes(id, &[byte; 32])]),
        })
    })
    .await;
    let tier = Tier::new(settings(&[&double.address], "client"));
    let requests = || double.requests();
    let fetch = async || {
        let fetched = tier.fetch("payroll", SymmetricDefault).await.unwrap();
        (fetched.unique_identifier, fetched.key.material().expose()[0])
    };
    assert_eq!(fetch().await, ("1".into(), 1));
    let cold = requests();
    assert_eq!(fetch().await, ("1".into(), 1));
    assert_eq!(requests() - cold, 1);
    *now.lock().unwrap() = ("2", 2);
    assert_eq!(fetch().await, ("2".into(), 2));
    // By identifier it is always one.
    let before = requests();
    tier.fetch("2", SymmetricDefault).await.unwrap();
    assert_eq!(requests() - before, 1);
}

#[tokio::test]
async fn servers_that_know_less_are_understood() {
    // No Discover Versions, no batches, no attributes.
    let double = Double::raw(|asked| {
        Act::Answer(match asked.operations.as_slice() {
            [DISCOVER_VERSIONS] => message(&[refused(Some(DISCOVER_VERSIONS), 5)]),
            [GET_ATTRIBUTES] => message(&[refused(Some(GET_ATTRIBUTES), 5)]),
            [GET] => message(&[aes("1", &[7; 32])]),
            [LOCATE] => message(&[found(&["1"])]),
            _ => message(&[refused(None, 4)]),
        })
    })
    .await;
    let tier = Tier::new(settings(&[&double.address], "client"));
    for key in ["1", "by-name", "by-name"] {
        assert_eq!(tier.fetch(key, SymmetricDefault).await.unwrap().key.material().expose(), [7; 32], "{key}");
    }
    // Only 1.4: other headers are refused as a whole.
    let double = Double::raw(|asked| {
        Act::Answer(match (asked.request, asked.operations.as_slice()) {
            (0, _) => message(&[refused(None, 4)]),
            (_, [DISCOVER_VERSIONS]) => message(&[versions()]),
            _ => message(&[attributes("1"), aes("1", &[7; 32])]),
        })
    })
    .await;
    assert!(Tier::new(settings(&[&double.address], "client")).fetch("1", SymmetricDefault).await.is_ok());
    // What a server refuses, by its reason.
    for (reason, code, is_transient) in [
        (0x01, "source_key_unknown", false),
        (0x37, "source_key_unknown", false),
        (0x03, "dsm_unauthenticated", true),
        (0x0C, "dsm_denied", false),
        (0x0D, "source_key_wrong_state", false),
        (0x36, "source_key_wrong_state", false),
        (0x16, "source_key_not_exportable", false),
        (0x17, "source_key_not_exportable", false),
        (0x100, "dsm_unavailable", true),
        (0x2A, "dsm_unavailable", true),
        (0x02, "dsm_protocol", false),
    ] {
        let double = Double::start(move |asked| match asked.operations.as_slice() {
            [LOCATE] => Act::Answer(message(&[found(&[])])),
            _ => Act::Answer(message(&[refused(Some(GET_ATTRIBUTES), reason)])),
        })
        .await;
        let error = Tier::new(settings(&[&double.address], "client")).fault("1").await;
        assert_eq!((error.code(), error.retry().is_some()), (code, is_transient), "{reason:#x}: {error}");
    }
    // A key whose value the server keeps.
    let double = Double::start(|_| {
        let block = structure(0x42_0040, &[enumeration(0x42_0042, 1)]);
        let object = [enumeration(0x42_0057, 2), text(0x42_0094, "1"), structure(0x42_008F, &[block])];
        Act::Answer(message(&[attributes("1"), done(GET, &object)]))
    })
    .await;
    let error = Tier::new(settings(&[&double.address], "client")).fault("1").await;
    assert_eq!(error.code(), "source_key_not_exportable", "{error}");
    // Seventeen of one name.
    let double = Double::start(|_| {
        let ids: Vec<String> = (0..17).map(|id| format!("id-{id}")).collect();
        Act::Answer(message(&[found(&ids.iter().map(String::as_str).collect::<Vec<_>>())]))
    })
    .await;
    let error = Tier::new(settings(&[&double.address], "client")).fault("many").await;
    assert!(
        matches!(&error, DsmError::KeyAmbiguous { candidates, more: true, .. } if candidates.len() == 16),
        "{error}"
    );
    // A wide attribute that nobody knows changes nothing.
    let double = Double::start(|_| {
        let strange = ttlv(0x54_0001, 8, &[7; 5000]);
        let known = done(GET_ATTRIBUTES, &[text(0x42_0094, "1"), strange]);
        Act::Answer(message(&[known, aes("1", &[7; 32])]))
    })
    .await;
    assert!(Tier::new(settings(&[&double.address], "client")).fetch("1", SymmetricDefault).await.is_ok());
}

#[tokio::test]
async fn connections_are_chosen_by_name() {
    let metrics = Metrics::new().unwrap();
    let none = Dsm::new(&BTreeMap::new(), None, &metrics).unwrap();
    let key = DsmKeyRef::parse("aes-256").unwrap();
    assert_eq!(none.knows(&key).unwrap_err().code(), "dsm_not_configured");
    assert_eq!(none.fetch(&key, SymmetricDefault).await.unwrap_err().code(), "dsm_not_configured");
    let both = Tier::of([("one", settings(&[&address()], "client")), ("two", settings(&[&address()], "other"))]);
    let error = both.fault("aes-256").await;
    assert!(error.code() == "dsm_connection_unknown" && error.to_string().contains("one, two"), "{error}");
    assert_eq!(both.fault("three/aes-256").await.code(), "dsm_connection_unknown");
    assert_eq!(both.fault("two/aes-256").await.code(), "source_key_unknown");
    assert_eq!(both.fetch("one/aes-256", SymmetricDefault).await.unwrap().connection, "one");
    let connections = BTreeMap::from([
        ("one".to_owned(), settings(&[&address()], "client")),
        ("two".to_owned(), settings(&[&address()], "other")),
    ]);
    let defaulted = Dsm::new(&connections, Some("one"), &Metrics::new().unwrap()).unwrap();
    assert_eq!(defaulted.fetch(&key, SymmetricDefault).await.unwrap().connection, "one");
    // Series exist before anything is asked.
    for series in [
        "keyferry_dsm_requests_total{connection=\"one\",operation=\"get\",outcome=\"failed\"}",
        "keyferry_dsm_reconnects_total{connection=\"two\"}",
        "keyferry_dsm_request_seconds_count{connection=\"two\"}",
    ] {
        both.metric(series);
    }
}

#[test]
fn what_is_wrong_with_the_files_names_setting_and_file() {
    let wrong = |settings: DsmConnection| {
        let connections = BTreeMap::from([("prod".to_owned(), settings)]);
        Dsm::new(&connections, None, &Metrics::new().unwrap()).unwrap_err().to_string()
    };
    let usual = || settings(&["127.0.0.1:1"], "client");
    for (settings, setting, path) in [
        (DsmConnection { ca_file: file("none.crt"), ..usual() }, "dsm.prod.ca_file", "none.crt"),
        (DsmConnection { ca_file: file("client.key"), ..usual() }, "dsm.prod.ca_file", "client.key"),
        (DsmConnection { cert_file: file("client.key"), ..usual() }, "dsm.prod.cert_file", "client.key"),
        (DsmConnection { key_file: file("client.crt"), ..usual() }, "dsm.prod.key_file", "client.crt"),
        (DsmConnection { key_file: file("other.key"), ..usual() }, "dsm.prod.key_file", "other.key"),
        (DsmConnection { server_name: Some("a b".into()), ..usual() }, "dsm.prod.server_name", "DNS name"),
    ] {
        let error = wrong(settings);
        assert!(error.contains(setting) && error.contains(path), "{error}");
    }
}

fn check(servers: &[&str], client: &str, arguments: &[&str]) -> (Option<i32>, String, String) {
    let directory = tempfile::tempdir().unwrap();
    let servers = servers.iter().map(|server| format!("\"{server}\"")).collect::<Vec<_>>().join(", ");
    let text = format!(
        "[dsm.prod]\nservers = [{servers}]\nca_file = \"{}\"\ncert_file = \"{}\"\nkey_file = \"{}\"\n",
        file("ca.crt").display(),
        file(&format!("{client}.crt")).display(),
        file(&format!("{client}.key")).display(),
    );
    std::fs::write(directory.path().join("keyferry.toml"), text).unwrap();
    let ran = Command::new(keyferry())
        .current_dir(directory.path())
        .args(["source", "check", "dsm"])
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (ran.status.code(), text(ran.stdout), text(ran.stderr))
}

#[test]
fn one_command_says_whether_a_connection_works_and_what_it_sees() {
    let server = address();
    let (id, holds) = registered("p256");
    let (code, out, err) = check(&[&server], "client", &["--key", "p256", "--kind", "ECC_NIST_P256"]);
    assert_eq!(code, Some(0), "{out}{err}");
    for said in
        [&format!("{server}: works; KMIP 2.0, TLSv1_2, certificate localhost until"), "sees 29 objects", &id, "(p256)"]
    {
        assert!(out.contains(said), "{said}: {out}");
    }
    let scalar = hex::encode(&holds[36..68]);
    let (code, out, _) =
        check(&[&server], "client", &["prod", "--key", "prod/p256", "--kind", "ECC_NIST_P256", "--json"]);
    let report: Value = serde_json::from_str(&out).unwrap();
    assert!(code == Some(0) && report["ok"] == true && report["key"]["usable"] == true, "{out}");
    assert_eq!(report["servers"][0]["details"]["kmip_version"], "2.0");
    assert!(!out.contains(&scalar));
    let (code, out, _) = check(&[&server], "client", &["--key", "p256", "--kind", "RSA_2048", "--json"]);
    let report: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &report["key"]["error"]["code"]), (Some(1), &Value::from("source_key_wrong_kind")), "{out}");
    // Each server is looked at, also behind one that works.
    let (code, out, _) = check(&[&server, "127.0.0.1:1"], "client", &[]);
    assert!(code == Some(1) && out.contains("works") && out.contains("127.0.0.1:1: does not work"), "{out}");
    let (code, out, _) = check(&[&server], "expired", &[]);
    assert!(code == Some(1) && out.contains("CertificateExpired") && out.contains("cert_file"), "{out}");
    let (code, _, err) = check(&[&server], "client", &["stage", "--json"]);
    assert!(code == Some(1) && err.contains("dsm_connection_unknown"), "{err}");
    let (code, _, err) = check(&[&server], "nobody", &[]);
    assert!(code == Some(2) && err.contains("dsm.prod.cert_file") && err.contains("nobody.crt"), "{err}");
    let (code, _, err) = check(&[&server], "client", &["--key", "p256"]);
    assert!(code == Some(2) && err.contains("--kind"), "{err}");
}

#[test]
fn settings_are_checked_with_the_files_that_they_name() {
    let directory = tempfile::tempdir().unwrap();
    let check = |ca_file: &str, further: &str| {
        let text = format!(
            "policy = \"allow-all\"\n[database]\nurl = \"postgres://u@h/d\"\n[rabbitmq]\nurl = \"amqp://h\"\n[keys]\nkek = \"{}\"\n\
             [[targets]]\naccount = \"111122223333\"\nregions = [\"eu-central-1\"]\n\
             [dsm.prod]\nservers = [\"127.0.0.1\"]\nca_file = \"{}\"\ncert_file = \"{}\"\nkey_file = \"{}\"\n{further}",
            "00".repeat(32),
            file(ca_file).display(),
            file("client.crt").display(),
            directory.path().join("client.key").display(),
        );
        std::fs::write(directory.path().join("keyferry.toml"), text).unwrap();
        let mut command = Command::new(keyferry());
        let ran = command.current_dir(directory.path()).args(["config", "check"]).output().unwrap();
        (ran.status.code(), String::from_utf8(ran.stderr).unwrap())
    };
    let key = directory.path().join("client.key");
    std::fs::copy(file("client.key"), &key).unwrap();
    assert_eq!(check("ca.crt", ""), (Some(0), String::new()));
    let (code, err) = check("none.crt", "");
    assert!(code == Some(2) && err.contains("dsm.prod.ca_file") && err.contains("none.crt"), "{err}");
    let (code, err) = check("ca.crt", "protocol = \"3.0\"");
    assert!(code == Some(2) && err.contains("prod") && err.contains("2.0"), "{err}");
    std::fs::set_permissions(&key, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    let (code, err) = check("ca.crt", "");
    assert!(code == Some(0) && err.contains("dsm.prod.key_file is open to more than its owner"), "{err}");
}
