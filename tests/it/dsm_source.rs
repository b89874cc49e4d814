//! The dsm tier: which keys it has of PyKMIP, and what it makes of the answers of others.

use crate::support::eventually;
use crate::support::kmip::{
    Act, DISCOVER_VERSIONS, Double, GET, GET_ATTRIBUTES, LOCATE, Line, Tier, address, aes, attributes, done,
    enumeration, file, found, hasty, message, refused, registered, settings, structure, text, ttlv, versions,
};
use keyferry::config::{DsmConnection, DsmProtocol};
use keyferry::job::{DsmKeyRef, KeyKind};
use keyferry::retry::Class;
use keyferry::source::{Dsm, DsmError, KeyMaterial, PlainKey};
use keyferry::telemetry::Metrics;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use KeyKind::{
    EccNistP256, EccNistP384, EccNistP521, EccSecgP256k1, Hmac224, Hmac256, Hmac384, Hmac512, Rsa2048, Rsa3072,
    Rsa4096, SymmetricDefault,
};

/// What can be used, and as what.
pub const USABLE: [(&str, KeyKind); 20] = [
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
