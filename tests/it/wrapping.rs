//! Material and wraps against OpenSSL and Python's `cryptography`: what is wrapped here is opened there, keys made there
//! are read here, and keys made here pass their checks.

use crate::support::variable;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use keyferry::job::{KeyKind, Partition, Wrapping, WrappingAlgorithm, WrappingKeySpec};
use keyferry::source::{KeyMaterial, PlainKey};
use keyferry::wrap::wrap;
use serde_json::json;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// Runs OpenSSL on some input and gives what it printed.
fn openssl(arguments: &str, input: &[u8]) -> Vec<u8> {
    let output = run(Command::new("openssl").args(arguments.split_whitespace()), input);
    assert!(output.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

fn run(command: &mut Command, input: &[u8]) -> Output {
    let pipe = Stdio::piped;
    let mut child = command.stdin(pipe()).stdout(pipe()).stderr(pipe()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    std::thread::scope(|scope| {
        // Beside the reading: much input and much output would wait for each other.
        scope.spawn(move || drop(stdin.write_all(input)));
        child.wait_with_output().unwrap()
    })
}

/// PKCS#8 DER of a new key of OpenSSL's making.
fn made_by_openssl(arguments: &str) -> Vec<u8> {
    // By PEM: genpkey itself writes older formats in DER.
    pkcs8(&openssl(&format!("genpkey {arguments}"), b""), "-nocrypt -outform DER")
}

fn pkcs8(key: &[u8], arguments: &str) -> Vec<u8> {
    openssl(&format!("pkcs8 -topk8 {arguments}"), key)
}

fn parse(kind: KeyKind, bytes: &[u8]) -> Result<PlainKey, &'static str> {
    PlainKey::parse(kind, KeyMaterial::new(bytes.to_vec())).map_err(|fault| fault.code())
}

/// What OpenSSL makes of each kind of pair.
const MADE: [(KeyKind, &str); 7] = [
    (KeyKind::Rsa2048, "-algorithm RSA -pkeyopt rsa_keygen_bits:2048"),
    (KeyKind::Rsa3072, "-algorithm RSA -pkeyopt rsa_keygen_bits:3072"),
    (KeyKind::Rsa4096, "-algorithm RSA -pkeyopt rsa_keygen_bits:4096"),
    (KeyKind::EccNistP256, "-algorithm EC -pkeyopt ec_paramgen_curve:P-256"),
    (KeyKind::EccNistP384, "-algorithm EC -pkeyopt ec_paramgen_curve:P-384"),
    (KeyKind::EccNistP521, "-algorithm EC -pkeyopt ec_paramgen_curve:P-521"),
    (KeyKind::EccSecgP256k1, "-algorithm EC -pkeyopt ec_paramgen_curve:secp256k1"),
];

#[test]
fn openssl_and_python_open_every_kind_wrapped_in_every_legal_way() {
    let directory = tempfile::tempdir().unwrap();
    let openers = WrappingKeySpec::ALL.map(|spec| (spec, Opener::new(directory.path(), spec)));
    let mut cases = Vec::new();
    for kind in KeyKind::ALL {
        let key = PlainKey::generate(kind).unwrap();
        for wrapping in Wrapping::legal(kind, Partition::Standard) {
            let (_, opener) = openers.iter().find(|(spec, _)| *spec == wrapping.key_spec).unwrap();
            let wrapped = wrap(key.material().expose(), &opener.public_key, wrapping).unwrap();
            let opened = opener.open(wrapping.algorithm, &wrapped);
            assert_eq!(opened, key.material().expose(), "{kind} {wrapping:?}");
            cases.push(json!({
                "private_key": hex::encode(&opener.private_key), "algorithm": wrapping.algorithm.as_str(),
                "wrapped": hex::encode(&wrapped), "material": hex::encode(key.material().expose()),
                "public_key": key.public_key().map(hex::encode),
            }));
        }
    }
    // Six ways for each of six secrets and three RSA pairs, twelve on a curve, and ten on P-521.
    assert_eq!(cases.len(), 9 * 6 + 3 * 12 + 10);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/unwrap.py");
    let mut python = Command::new(variable("KEYFERRY_TEST_PYTHON"));
    let output = run(python.arg(script), &serde_json::to_vec(&cases).unwrap());
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(said.trim_end(), "100 opened", "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn openssls_keys_are_read_and_ours_pass_its_checks() {
    for (kind, arguments) in MADE {
        let given = made_by_openssl(arguments);
        let key = parse(kind, &given).unwrap();
        assert_eq!(key.material().expose(), given, "{kind}: OpenSSL writes the same form");
        let public_key = openssl("pkey -inform DER -pubout -outform DER", &given);
        assert_eq!(key.public_key(), Some(public_key.as_slice()), "{kind}");

        let ours = PlainKey::generate(kind).unwrap();
        let checked = openssl("pkey -inform DER -check -pubcheck -pubout -outform DER", ours.material().expose());
        assert!(checked.ends_with(ours.public_key().unwrap()), "{kind}");
    }
    // Written otherwise: another point form.
    let p256 = made_by_openssl(MADE[3].1);
    for form in ["compressed", "uncompressed"] {
        let other = openssl(&format!("ec -inform DER -conv_form {form} -outform DER"), &p256);
        let other = pkcs8(&other, "-nocrypt -inform DER -outform DER");
        assert_eq!(parse(KeyKind::EccNistP256, &other).unwrap().material().expose(), p256, "{form}");
    }
}

#[test]
fn what_openssl_writes_otherwise_is_refused_by_its_code() {
    let rsa = made_by_openssl(MADE[0].1);
    let p256 = made_by_openssl(MADE[3].1);
    let pem = pkcs8(&p256, "-nocrypt -inform DER");
    let (rsa_kind, p256_kind) = (KeyKind::Rsa2048, KeyKind::EccNistP256);
    let with = |key: &[u8], arguments: &str| openssl(arguments, key);
    let curve = |name: &str| made_by_openssl(&format!("-algorithm EC -pkeyopt ec_paramgen_curve:{name}"));
    let explicit = made_by_openssl("-algorithm EC -pkeyopt ec_paramgen_curve:P-256 -pkeyopt ec_param_enc:explicit");
    let three_primes = pkcs8(&openssl("genrsa -primes 3 2048", b""), "-nocrypt -outform DER");
    let certificate = {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &pem).unwrap();
        let path = file.path().display();
        let made = openssl(&format!("req -x509 -new -key {path} -subj /CN=x -outform DER"), b"");
        let pkcs12 = openssl(&format!("pkcs12 -export -nocerts -inkey {path} -passout pass:x"), b"");
        [made, pkcs12]
    };
    for (name, kind, given, code) in [
        ("PEM", p256_kind, pem.clone(), "material_is_pem"),
        ("PEM with text before", rsa_kind, with(&rsa, "pkey -inform DER -text"), "material_is_pem"),
        ("base64", p256_kind, STANDARD.encode(&p256).into_bytes(), "material_is_base64"),
        ("base64 in lines", rsa_kind, with(&rsa, "base64 -e"), "material_is_base64"),
        ("hex", rsa_kind, hex::encode(&rsa).into_bytes(), "material_is_hex"),
        ("encrypted", rsa_kind, pkcs8(&rsa, "-inform DER -outform DER -passout pass:x"), "material_is_encrypted"),
        ("PKCS#1", rsa_kind, with(&rsa, "rsa -inform DER -traditional -outform DER"), "material_is_pkcs1"),
        ("SEC 1", p256_kind, with(&p256, "ec -inform DER -outform DER"), "material_is_sec1"),
        ("RSA public key", rsa_kind, with(&rsa, "pkey -inform DER -pubout -outform DER"), "material_is_public_key"),
        (
            "RSA public key, PKCS#1",
            rsa_kind,
            with(&rsa, "rsa -inform DER -RSAPublicKey_out -outform DER"),
            "material_is_public_key",
        ),
        ("EC public key", p256_kind, with(&p256, "pkey -inform DER -pubout -outform DER"), "material_is_public_key"),
        ("certificate", p256_kind, certificate[0].clone(), "material_is_public_key"),
        ("PKCS#12", p256_kind, certificate[1].clone(), "material_is_container"),
        ("explicit parameters", p256_kind, explicit, "material_explicit_curve"),
        ("three primes", rsa_kind, three_primes, "material_multi_prime"),
        (
            "1024 bits",
            rsa_kind,
            made_by_openssl("-algorithm RSA -pkeyopt rsa_keygen_bits:1024"),
            "material_wrong_modulus",
        ),
        (
            "PSS",
            rsa_kind,
            made_by_openssl("-algorithm RSA-PSS -pkeyopt rsa_keygen_bits:2048"),
            "material_wrong_algorithm",
        ),
        ("Ed25519", p256_kind, made_by_openssl("-algorithm ED25519"), "material_wrong_algorithm"),
        ("X448", rsa_kind, made_by_openssl("-algorithm X448"), "material_wrong_algorithm"),
        ("EC for RSA", rsa_kind, p256.clone(), "material_wrong_algorithm"),
        ("RSA for EC", p256_kind, rsa.clone(), "material_wrong_algorithm"),
        ("P-192", p256_kind, curve("P-192"), "material_wrong_curve"),
        ("brainpool", p256_kind, curve("brainpoolP256r1"), "material_wrong_curve"),
        ("SM2", p256_kind, curve("SM2"), "material_wrong_curve"),
        ("secp256k1 for P-256", p256_kind, curve("secp256k1"), "material_wrong_curve"),
        ("cut off", p256_kind, p256[..100].to_vec(), "material_truncated"),
        ("a line break behind", p256_kind, [p256.as_slice(), b"\n"].concat(), "material_trailing_bytes"),
        ("a secret", p256_kind, vec![7; 32], "material_not_pkcs8"),
    ] {
        assert_eq!(parse(kind, &given).unwrap_err(), code, "{name}");
    }
}

/// A wrapping key and the file from which OpenSSL reads it.
struct Opener {
    private_key: Vec<u8>,
    public_key: Vec<u8>,
    file: std::path::PathBuf,
    modulus: usize,
}

impl Opener {
    fn new(directory: &Path, spec: WrappingKeySpec) -> Self {
        let name = format!("wrapping_{}_a.der", spec.as_str().to_lowercase());
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake_kms/fixtures").join(&name);
        let private_key = std::fs::read(file).unwrap();
        let public_key = openssl("pkey -inform DER -pubout -outform DER", &private_key);
        let file = directory.join(name);
        std::fs::write(&file, &private_key).unwrap();
        Self { private_key, public_key, file, modulus: spec.modulus_bytes() }
    }

    /// As AWS's procedure wraps, the other way round.
    fn open(&self, algorithm: WrappingAlgorithm, wrapped: &[u8]) -> Vec<u8> {
        let (hash, is_hybrid) = match algorithm {
            WrappingAlgorithm::OaepSha256 => ("sha256", false),
            WrappingAlgorithm::OaepSha1 => ("sha1", false),
            WrappingAlgorithm::RsaAesSha256 => ("sha256", true),
            WrappingAlgorithm::RsaAesSha1 => ("sha1", true),
        };
        let (block, rest) = wrapped.split_at(self.modulus);
        let opened = openssl(
            &format!(
                "pkeyutl -decrypt -keyform DER -inkey {} -pkeyopt rsa_padding_mode:oaep -pkeyopt rsa_oaep_md:{hash} \
                 -pkeyopt rsa_mgf1_md:{hash}",
                self.file.display()
            ),
            block,
        );
        if !is_hybrid {
            assert!(rest.is_empty());
            return opened;
        }
        openssl(&format!("enc -d -id-aes256-wrap-pad -iv A65959A6 -K {}", hex::encode(opened)), rest)
    }
}
