//! Postgres: the way there, what it is, the schema, the worker's rights, its clock.

use super::finding::Finding;
use super::{clock, within};
use crate::cli::sender::now;
use crate::config::Loaded;
use crate::job::KeyArn;
use crate::source::SealedFingerprintKey;
use crate::store::{Look, ReachError, SchemaError, Server, Store, StoreError};
use std::time::Duration;

/// The oldest that the schema is written for (`unique nulls not distinct`).
const OLDEST: i32 = 150_000;

/// What other checks want to know of the store.
pub(super) struct Seen {
    /// `None` before the first start.
    pub(super) fingerprint_key: Option<SealedFingerprintKey>,
    /// KMS keys of the last jobs, the latest first.
    pub(super) last_keys: Vec<KeyArn>,
}

pub(super) async fn check(loaded: &Loaded, timeout: Duration) -> (Vec<Finding>, Option<Seen>) {
    const CHECK: &str = "postgres.connection";
    const CODE: &str = "postgres_no_answer";
    let Ok(url) = loaded.database_url() else {
        return (vec![Finding::skipped("postgres", "setting_missing", "database.url is missing")], None);
    };
    let look = match within(timeout, CHECK, CODE, Look::open(url, &loaded.settings.database)).await {
        Ok(Ok(look)) => look,
        Ok(Err(error)) => return (vec![unreached(&error)], None),
        Err(finding) => return (vec![finding], None),
    };
    let mut found = Vec::new();
    let seen = match within(timeout, CHECK, CODE, inspect(loaded, url, &look, &mut found)).await {
        Ok(Ok(seen)) => seen,
        Ok(Err(error)) => {
            found.push(failed(CHECK, &error));
            None
        }
        Err(finding) => {
            found.push(finding);
            None
        }
    };
    (found, seen)
}

/// What was found before an error stays found.
async fn inspect(
    loaded: &Loaded,
    url: &str,
    look: &Look,
    found: &mut Vec<Finding>,
) -> Result<Option<Seen>, StoreError> {
    let server = look.server().await?;
    found.extend(of_server(&server));
    let before = now();
    let theirs = look.clock().await?;
    found.push(clock::compare("postgres.clock".into(), "Postgres's", theirs, before, now()));
    let schema = Store::new(url, &loaded.settings.database)?.check_schema().await;
    let is_there = !matches!(schema, Err(SchemaError::Absent));
    // A right that is missing may be why the schema could not be read.
    let is_current = matches!(schema, Ok(()) | Err(SchemaError::Store(_)));
    found.push(of_schema(schema));
    if !is_there {
        let reason = "there is no schema yet";
        found.push(Finding::skipped("postgres.rights", "needs_schema", reason));
        return Ok(None);
    }
    found.extend(if is_current {
        rights(look, &server.role).await?
    } else {
        vec![Finding::skipped("postgres.rights", "needs_schema", "the schema is not this binary's")]
    });
    let ahead = look.clock_offset().await?;
    if ahead != 0.0 {
        let message = format!(
            "the store's own clock was moved by {ahead} s, as only tests do it: leases and deadlines follow it"
        );
        let advice = "as the database's owner: update clock_offset set ahead = '0'";
        found.push(Finding::failed("postgres.clock", "store_clock_moved", message, advice));
    }
    let last_keys = look.last_keys().await?.iter().filter_map(|arn| KeyArn::parse(arn).ok()).collect();
    Ok(Some(Seen { fingerprint_key: look.fingerprint_key().await?, last_keys }))
}

fn of_server(server: &Server) -> Vec<Finding> {
    let Server { role, version, tls, is_read_only } = server;
    let version_words = format!("{}.{}", version / 10_000, version % 10_000);
    let mut found = vec![Finding::ok("postgres.connection", format!("connected as {role}"))];
    found.push(match tls {
        Some(tls) => Finding::ok("postgres.tls", format!("{tls}, and the server's certificate was verified")),
        None => Finding::warning(
            "postgres.tls",
            "postgres_plaintext",
            "the connection is not encrypted",
            "add ?sslmode=require to database.url, and database.ca_file where the authority is a private one",
        ),
    });
    found.push(if *version < OLDEST {
        let message = format!("Postgres is {version_words}, and the schema needs 15 or newer");
        Finding::failed("postgres.version", "postgres_too_old", message, "upgrade Postgres")
    } else {
        Finding::ok("postgres.version", format!("Postgres {version_words}"))
    });
    if *is_read_only {
        let message = "the server writes nothing: it is a standby, or told to be read-only";
        let advice = "point database.url at the primary, as by target_session_attrs=read-write";
        found.push(Finding::failed("postgres.connection", "postgres_read_only", message, advice));
    }
    found
}

fn of_schema(schema: Result<(), SchemaError>) -> Finding {
    const CHECK: &str = "postgres.schema";
    let Err(error) = schema else {
        return Finding::ok(CHECK, "the schema is the one that this binary needs");
    };
    let (code, advice) = match &error {
        SchemaError::Absent => ("schema_absent", "keyferry migrate"),
        SchemaError::TooOld { .. } => ("schema_too_old", "keyferry migrate"),
        SchemaError::BinaryTooOld { .. } => {
            ("binary_too_old", "install the keyferry that migrated this database, or a newer one")
        }
        SchemaError::NoRoles => ("schema_no_roles", "psql -f ops/postgres/roles.sql"),
        SchemaError::Locked(_) | SchemaError::Failed(_) | SchemaError::Store(_) => {
            ("schema_unreadable", "see postgres.rights")
        }
    };
    Finding::failed(CHECK, code, error.to_string(), advice)
}

async fn rights(look: &Look, role: &str) -> Result<Vec<Finding>, StoreError> {
    const CHECK: &str = "postgres.rights";
    let found = look.rights().await?;
    let mut findings = Vec::new();
    if !found.missing.is_empty() {
        let message = format!("the role {role} lacks what a worker needs: {}", found.missing.join("; "));
        let advice =
            "connect as keyferry_worker, to which keyferry migrate grants it; or grant keyferry_worker to the role";
        findings.push(Finding::failed(CHECK, "rights_missing", message, advice));
    }
    if !found.beyond.is_empty() {
        let message = format!("the role {role} has more rights than a worker needs: {}", found.beyond.join("; "));
        let advice =
            "connect as keyferry_worker: with more rights, whoever takes over a worker can change the audit trail";
        findings.push(Finding::warning(CHECK, "rights_beyond_need", message, advice));
    }
    if findings.is_empty() {
        findings.push(Finding::ok(CHECK, format!("the role {role} has the rights of a worker and no others")));
    }
    Ok(findings)
}

fn unreached(error: &ReachError) -> Finding {
    let (code, advice) = match error {
        ReachError::Settings(_) => ("setting_wrong", "mend database.url or database.ca_file"),
        ReachError::Away(_) => {
            ("postgres_unreachable", "look at the host and port of database.url, and whether Postgres runs there")
        }
        ReachError::Tls(_) => (
            "postgres_tls",
            "look at database.ca_file, at the host's name in database.url, and at the server's ssl setting",
        ),
        ReachError::Password(_) => {
            ("postgres_password", "look at user and password in database.url; ops/postgres/roles.sql sets passwords")
        }
        ReachError::NoDatabase(_) => {
            ("postgres_no_database", "psql -f ops/postgres/database.sql makes it; or mend the name in database.url")
        }
        ReachError::NotLetIn(_) => (
            "postgres_not_let_in",
            "look at the server's pg_hba.conf, and grant connect on the database to keyferry_worker",
        ),
        ReachError::Full(_) => ("postgres_full", "raise max_connections, or lower database.connections of the workers"),
        ReachError::Other(_) => ("postgres_failed", "Postgres's own words are all that is known; its log may say more"),
    };
    Finding::failed("postgres.connection", code, format!("Postgres: {error}"), advice)
}

fn failed(check: &str, error: &StoreError) -> Finding {
    Finding::failed(check, "postgres_failed", error.to_string(), "Postgres's log may say more")
}
