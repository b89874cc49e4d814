//! What the store's tests start from: requests, keys, steps and ends, with no more said than a test is about.

use crate::support::db::TestDb;
use keyferry::audit::{Fact, Kind};
use keyferry::job::{
    Failure, FailureCode, ImportParameters, JobResult, JobSummary, KeyArn, KeyKind, Refusal, RefusalCode, Request,
    RequestId, ScarceCall,
};
use keyferry::source::{Kek, Keyring, PlainKey, SealedKey};
use keyferry::store::{
    Candidate, Chosen, ClaimedJob, Intent, Material, NewJob, NewRefusal, NewSourceKey, Parameters, Removed, RetryState,
    Scan, Sender, Settlement, SettlementKind, SourceKeyOrigin, Step, Store, Verdict,
};
use serde_json::{Value, json};
use std::time::Duration;
use time::OffsetDateTime;
use tokio_postgres::Client;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

/// Who does what operators do.
pub const OPERATOR: &str = "op";
/// As in the default settings.
pub const LEASE: Duration = Duration::from_secs(30);
pub const SIGNATURE_LIFE: Duration = Duration::from_secs(600);
pub const REGION: &str = "eu-central-1";

/// A database of one test's own, a store on it, and a look behind that.
pub struct Case {
    pub db: TestDb,
    pub store: Store,
    pub client: Client,
}

pub async fn case() -> Case {
    let db = TestDb::create().await;
    let (store, client) = (db.store().await, db.client().await);
    Case { db, store, client }
}

impl Case {
    /// What holds between any two transactions.
    pub async fn assert_sound(&self) {
        assert_dense(&self.client).await;
        assert_audit_holds(&self.client).await;
        let off = "select coalesce(sum(change), 0)::bigint - (select count(*) from job where state = 'waiting')
                   from (select change from backlog_change union all select waiting from backlog) as known";
        assert_eq!(value::<i64>(&self.client, off, &[]).await, 0, "the backlog's count is off");
    }
}

/// The `n`th key of the usual Region.
pub fn arn(n: u128) -> KeyArn {
    arn_in(REGION, n)
}

/// The `n`th key of a Region.
pub fn arn_in(region: &str, n: u128) -> KeyArn {
    KeyArn::parse(&format!("arn:aws:kms:{region}:111122223333:key/{}", Uuid::from_u128(n))).unwrap()
}

/// A job that says nothing but its id and key.
pub fn job(id: &str, key: &KeyArn) -> NewJob {
    job_with(id, key, json!({}))
}

/// A job with more fields than its id and key.
pub fn job_with(id: &str, key: &KeyArn, mut fields: Value) -> NewJob {
    if fields.get("key").is_none() {
        fields["key"] = json!(key.to_string());
    }
    let request = Request::from_canonical(&fields.to_string(), RequestId::parse(id).unwrap(), String::new()).unwrap();
    NewJob {
        id: Uuid::now_v7(),
        principal: "anonymous".into(),
        request,
        key: key.clone(),
        traceparent: None,
        ingress: "test",
        sender: nobody(),
        rule: None,
    }
}

/// Where nobody is asked who they are.
pub fn nobody() -> Sender {
    Sender { identity: None, is_verified: false, policy: "allow-all".into() }
}

/// A delete that overtakes its line.
pub fn urgent(id: &str, key: &KeyArn) -> NewJob {
    job_with(id, key, json!({"operation": "delete", "urgent": true}))
}

/// A refusal of the message with this id.
pub fn refusal(id: &str, code: RefusalCode) -> NewRefusal {
    let job = job(id, &arn(0));
    NewRefusal {
        id: job.id,
        principal: job.principal,
        id_hash: job.request.id_hash(),
        digest: keyferry::store::MessageDigest::Body(job.request.digest()),
        refusal: Refusal::whole(code, "no"),
        request_id: Some(id.to_owned()),
        operation: Some(job.request.operation()),
        key: Some(job.key),
        ingress: "test",
        sender: nobody(),
        rule: None,
        traceparent: None,
    }
}

/// Accepts a slice of jobs, all of them new.
pub async fn accept(store: &Store, jobs: &[NewJob]) {
    let candidates: Vec<Candidate> = jobs.iter().cloned().map(Candidate::Job).collect();
    for slice in candidates.chunks(200) {
        assert!(store.accept(slice).await.unwrap().iter().all(|verdict| *verdict == Verdict::Accepted));
    }
}

/// Accepts `count` jobs on one key, `name-1` first.
pub async fn accept_line(store: &Store, name: &str, key: &KeyArn, count: usize) {
    let jobs: Vec<NewJob> = (1..=count).map(|n| job(&format!("{name}-{n}"), key)).collect();
    for job in jobs {
        accept(store, &[job]).await;
    }
}

/// Claims with the usual lease, again while all that was found is put aside, and at last below the bounds, as a worker does.
pub async fn claim(store: &Store, most: usize) -> Vec<ClaimedJob> {
    let mut scan = Scan::FromBounds;
    loop {
        let claimed = store.claim(most, LEASE, SIGNATURE_LIFE, scan).await.unwrap();
        if !claimed.jobs.is_empty() || claimed.put_aside == 0 && scan == Scan::Whole {
            return claimed.jobs;
        }
        scan = if claimed.put_aside == 0 { Scan::Whole } else { Scan::FromBounds };
    }
}

/// Claims the one job that is to be had.
pub async fn claim_one(store: &Store) -> ClaimedJob {
    let mut jobs = claim(store, 8).await;
    assert_eq!(jobs.len(), 1);
    jobs.remove(0)
}

/// Settles one end of an attempt.
pub async fn settle(store: &Store, end: &Settlement) -> bool {
    let held = store.settle(&[end], SIGNATURE_LIFE).await.unwrap();
    assert_eq!(held.len(), 1);
    held[0].is_held()
}

/// An end of the job's attempt.
pub fn end(job: &ClaimedJob, kind: SettlementKind) -> Settlement {
    Settlement {
        lease: job.lease,
        job: JobSummary {
            id: job.id,
            key: job.key.clone(),
            retry_of: job.retry_of,
            principal: job.principal.clone(),
            request_id: job.request.id.as_str().to_owned(),
            operation: job.request.operation().as_str(),
            dry_run: false,
            batch: None,
            sequence: job.sequence,
            accepted_at: job.accepted_at,
            traceparent: None,
        },
        key_id: job.key_id,
        rotations: None,
        facts: Vec::new(),
        late_effect: None,
        removed: Removed::Nothing,
        kind,
    }
}

/// The job succeeded.
pub fn succeeded(job: &ClaimedJob) -> Settlement {
    let outcome = Ok(JobResult(json!({"aws_param": {"CurrentKeyMaterialId": null}})));
    end(job, SettlementKind::Ended { outcome, source_key_id: None, material: None })
}

/// The job failed, for this reason.
pub fn failed(job: &ClaimedJob, message: &str) -> Settlement {
    let failure = Failure { code: FailureCode::AwsRefused, message: message.into(), aws_changed: false, policy: None };
    end(job, SettlementKind::Ended { outcome: Err(failure), source_key_id: None, material: None })
}

/// The attempt is to be repeated.
pub fn retry(job: &ClaimedJob, delay: Duration, deadline: OffsetDateTime, state: RetryState) -> Settlement {
    let next = match state.parameters {
        Parameters::Kept => ScarceCall::ImportKeyMaterial,
        Parameters::Absent | Parameters::Refused | Parameters::Used => job.request.first_call(),
    };
    end(job, SettlementKind::Retry { delay, deadline, reason: json!({"message": "later"}), state, next })
}

/// The attempt did not begin.
pub fn put_back(job: &ClaimedJob, until: Option<OffsetDateTime>) -> Settlement {
    end(job, SettlementKind::PutBack { until: until.unwrap_or(job.now), deadline: job.deadline })
}

/// A keyring under a fixed key-encryption key.
pub fn keyring() -> Keyring {
    let kek = Kek::parse(&hex::encode([7; 32])).unwrap();
    let sealed = Keyring::new_fingerprint_key(&kek).unwrap();
    Keyring::open(kek, &sealed).unwrap()
}

/// A sealed source key that is not stored yet.
pub fn sealed(name: &str) -> SealedKey {
    let key = PlainKey::generate(KeyKind::SymmetricDefault).unwrap();
    SealedKey::seal(&keyring(), Uuid::now_v7(), name.into(), &key).unwrap()
}

/// Stores a source key; false when its name is taken.
pub async fn add_source_key(store: &Store, key: &SealedKey) -> bool {
    let new = NewSourceKey { key: key.clone(), origin: SourceKeyOrigin::Imported, operator: "op".into() };
    store.add_source_key(&new).await.unwrap()
}

/// The step before the mutating call, with a stored source key.
pub fn step(job: &ClaimedJob, key: &SealedKey) -> Step {
    Step {
        lease: job.lease,
        job_id: job.id,
        intent: Intent::Import {
            source: Chosen::Local(key.id),
            generated: None,
            parameters: Some(Box::new(parameters(job))),
            rotated_from: None,
        },
        effect: format!("import {} never", key.id),
        facts: vec![Fact::new(Kind::ImportIntended, json!({"attempt": job.attempt}))],
    }
}

fn parameters(job: &ClaimedJob) -> ImportParameters {
    ImportParameters {
        region: job.key.region().to_owned(),
        wrapping: keyferry::job::Wrapping {
            algorithm: keyferry::job::WrappingAlgorithm::OaepSha256,
            key_spec: keyferry::job::WrappingKeySpec::Rsa2048,
        },
        public_key: vec![1; 294],
        import_token: vec![2; 1_500],
        valid_to: job.now + time::Duration::hours(24),
        aws_request_id: None,
    }
}

/// The same with a key that is generated for the job.
pub fn generating_step(job: &ClaimedJob) -> (Step, SealedKey) {
    let key = sealed(&format!("keyferry-{}", job.id));
    let intent = Intent::Import {
        source: Chosen::Local(key.id),
        generated: Some(Box::new(key.clone())),
        parameters: Some(Box::new(parameters(job))),
        rotated_from: None,
    };
    (Step { intent, ..step(job, &key) }, key)
}

/// The material of a source key.
pub fn material(key: &SealedKey, is_certain: bool) -> Material {
    Material {
        fingerprint: key.fingerprint.clone(),
        source_tier: "local",
        source_key_id: key.id.to_string(),
        source_key_name: key.name.clone(),
        key_material_id: None,
        valid_to: None,
        is_certain,
    }
}

/// One value of one row.
pub async fn value<T>(client: &Client, query: &str, parameters: &[&(dyn ToSql + Sync)]) -> T
where
    T: for<'a> tokio_postgres::types::FromSql<'a>,
{
    client.query_one(query, parameters).await.unwrap().get(0)
}

/// Everything that verbs change, to show that one changed nothing.
pub async fn contents(client: &Client) -> String {
    let mut all = Vec::new();
    for table in ["line", "job", "progress", "future", "kms_key", "kms_material", "request", "refusal", "outbox"]
        .into_iter()
        .chain([
            "audit_entry",
            "source_key",
            "urgent",
            "cancellation",
            "failed_choice",
            "backlog_change",
            "refusal_meter",
            "refusal_fold",
            "refusal_folded",
        ])
    {
        let query = format!("select coalesce(string_agg(t::text, E'\\n' order by t::text), '') from {table} as t");
        all.push(format!("-- {table}\n{}", value::<String>(client, &query, &[]).await));
    }
    all.join("\n")
}

/// Every line's places are 1..n without a gap or a double, and its row knows how many there are.
pub async fn assert_dense(client: &Client) {
    let query = "
        select line.id from line left join job on job.line_id = line.id and job.seq is not null
        group by line.id
        having count(job.seq) <> line.tail_seq or count(distinct job.seq) <> line.tail_seq
            or coalesce(min(job.seq), 1) <> 1 or coalesce(max(job.seq), 0) <> line.tail_seq";
    let wrong = client.query(query, &[]).await.unwrap();
    assert!(wrong.is_empty(), "{} lines are not dense", wrong.len());
    assert_heads_wait(client).await;
}

/// The head of a line is the first of its jobs that has not ended; only jobs that wait are urgent.
pub async fn assert_heads_wait(client: &Client) {
    let query = "
        select line.id from line
        where head_seq <> coalesce((select min(seq) from job where line_id = line.id and state = 'waiting'), tail_seq + 1)
        union all
        select line_id from cancellation left join job on id = job_id where state is distinct from 'waiting'
        union all
        select urgent.line_id from urgent left join job using (line_id, seq) where job.state is distinct from 'waiting'";
    let wrong = client.query(query, &[]).await.unwrap();
    assert!(wrong.is_empty(), "{} lines have a head that does not wait", wrong.len());
}

/// Every subject's audit entries are 1..n, and each entry's bytes are canonical and say what its columns say.
pub async fn assert_audit_holds(client: &Client) {
    let rows = client.query("select subject, n, entry from audit_entry order by subject, n", &[]).await.unwrap();
    let mut last: Option<(Uuid, i32)> = None;
    for row in &rows {
        let (subject, n, text): (Uuid, i32, &str) = (row.get(0), row.get(1), row.get(2));
        let entry: Value = serde_json::from_str(text).unwrap();
        assert_eq!(entry.to_string(), text, "not canonical");
        assert_eq!(entry["subject"], json!(subject));
        assert_eq!(entry["n"], json!(n));
        assert!(entry["kind"].is_string() && entry["at"].is_string());
        let expected = last.filter(|(before, _)| *before == subject).map_or(1, |(_, n)| n + 1);
        assert_eq!(n, expected, "{subject}: entries are not numbered 1..n");
        last = Some((subject, n));
    }
}

/// Waits until so many sessions of this database wait for a lock. Not to be asked within a transaction, which would
/// see the same picture for ever.
pub async fn until_waiting(client: &Client, sessions: i64) {
    let query = "
        select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'";
    for _ in 0..500 {
        if value::<i64>(client, query, &[]).await >= sessions {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("nobody waits");
}
