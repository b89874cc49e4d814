//! One test's world: a database, a virtual host, queues of SQS, a double of AWS KMS and real workers, all its own.

use super::broker::{DEAD, JOBS, Message, Received, User, Vhost};
use super::checker::violations;
use super::db::{TestDb, connect};
use super::fake::{ACCOUNT, Fake, REGION, SECRET, WORKER};
use super::private_broker::PrivateBroker;
use super::private_postgres::PrivatePostgres;
use super::process::Process;
use super::snapshot::{Job, Refusal, Secret, Snapshot, jobs, refusals};
use super::sqs::{Queues, Role, SQS_REGION};
use super::sqs_proxy::Proxy;
use super::{eventually, http, keyferry, variable};
use rustix::process::Signal;
use serde_json::{Value, json};
use sha2::Digest as _;
use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;
use time::OffsetDateTime;
use tokio_postgres::Client;

/// What carries messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carrier {
    RabbitMq,
    Sqs,
    SqsFifo,
}

impl Carrier {
    fn setting(self) -> &'static str {
        match self {
            Self::RabbitMq => "rabbitmq",
            Self::Sqs | Self::SqsFifo => "sqs",
        }
    }

    pub fn is_sqs(self) -> bool {
        self != Self::RabbitMq
    }

    /// Whether it can carry these bytes. SQS takes no empty body, and of Unicode only what XML can hold
    /// (SQS API Reference, `SendMessage`).
    pub fn carries(self, message: &Message) -> bool {
        let is_char =
            |c: char| matches!(c, '\t' | '\n' | '\r' | ' '..='\u{d7ff}' | '\u{e000}'..='\u{fffd}' | '\u{10000}'..);
        let text = std::str::from_utf8(&message.body);
        self == Self::RabbitMq || text.is_ok_and(|text| !text.is_empty() && text.chars().all(is_char))
    }
}

/// What carries requests, what carries events.
#[derive(Clone, Copy, Debug)]
pub struct Carriage {
    pub requests: &'static [Carrier],
    pub events: Carrier,
}

impl Carriage {
    pub const RABBITMQ: Self = Self { requests: &[Carrier::RabbitMq], events: Carrier::RabbitMq };
    pub const SQS: Self = Self { requests: &[Carrier::Sqs], events: Carrier::Sqs };
    pub const SQS_FIFO: Self = Self { requests: &[Carrier::SqsFifo], events: Carrier::SqsFifo };

    fn uses(self, is_wanted: impl Fn(Carrier) -> bool) -> bool {
        is_wanted(self.events) || self.requests.iter().copied().any(is_wanted)
    }
}

/// As much as the double bears. Tests of the quota put a line of their own in its place.
pub const UNGOVERNED: &str = "quota.rates = { GetParametersForImport = 'unlimited', ImportKeyMaterial = 'unlimited', \
                              DeleteImportedKeyMaterial = 'unlimited', RotateKeyOnDemand = 'unlimited', \
                              ListKeyRotations = 'unlimited' }";

/// A worker's settings that tests turn.
#[derive(Clone, Copy, Debug)]
pub struct Tuning {
    pub concurrency: usize,
    pub lease_ms: u64,
    pub aws_timeout_ms: u64,
    pub signature_life_ms: u64,
    pub grace_ms: u64,
    /// Seconds for which SQS hides a message whose worker died.
    pub visibility_s: u64,
    /// Receives from SQS beside each other.
    pub pollers: usize,
}

impl Default for Tuning {
    /// As generous as in production, but for a poll that no test waits for.
    fn default() -> Self {
        Self {
            concurrency: 16,
            lease_ms: 30_000,
            aws_timeout_ms: 10_000,
            signature_life_ms: 600_000,
            grace_ms: 20_000,
            visibility_s: 60,
            pollers: 2,
        }
    }
}

impl Tuning {
    /// For takeovers: leases run out soon, and what was unanswered is over soon.
    pub fn hasty() -> Self {
        Self { lease_ms: 3_000, aws_timeout_ms: 1_000, signature_life_ms: 2_000, visibility_s: 5, ..Self::default() }
    }
}

/// A running worker.
pub struct Worker {
    process: Process,
    address: String,
}

impl Worker {
    /// Where its admin port is.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The body and status of `/readyz`.
    pub async fn ready(&self) -> Option<(u16, String)> {
        self.get("readyz").await
    }

    /// A page of the admin port; nothing when it does not answer.
    pub async fn get(&self, page: &str) -> Option<(u16, String)> {
        let answer = http().get(format!("http://{}/{page}", self.address)).send().await.ok()?;
        Some((answer.status().as_u16(), answer.text().await.ok()?))
    }

    /// A metric's value; series as in the exposition, labels included.
    pub async fn metric(&self, series: &str) -> f64 {
        let (_, text) = self.get("metrics").await.unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.map_or(0.0, |value| value.parse().unwrap())
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// Waits until it ends by itself; says whether by an abort, as a failpoint does it.
    pub async fn aborted(&mut self) -> bool {
        use std::os::unix::process::ExitStatusExt as _;
        self.process.wait(Duration::from_secs(40)).await.signal() == Some(Signal::ABORT.as_raw())
    }

    /// Whether it has not ended yet.
    pub fn is_running(&mut self) -> bool {
        self.process.ended().is_none()
    }

    /// Ends it by force.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Asks it to stop and expects an orderly end.
    pub async fn stop(&mut self) {
        self.signal(Signal::TERM);
        self.ends_well().await;
    }

    /// Expects an orderly end of a worker that was asked to stop.
    pub async fn ends_well(&mut self) {
        let status = self.process.wait(Duration::from_secs(40)).await;
        assert!(status.success(), "SIGTERM ended the worker with {status}:\n{}", self.log());
    }
}

/// What a command printed and how it ended.
#[derive(Debug)]
pub struct Ran {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Ran {
    /// Standard output as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// All of it. Workers come first: they are to be gone before what they use.
pub struct World {
    pub workers: Vec<Worker>,
    pub fake: Fake,
    pub vhost: Vhost,
    pub queues: Queues,
    pub proxy: Proxy,
    pub carriage: Carriage,
    pub client: Client,
    pub db: TestDb,
    kek: String,
    published: Vec<Message>,
    respelt: usize,
    redriven: usize,
    events: Vec<Received>,
    dead: Vec<Received>,
    secrets: Vec<Secret>,
    dsm_keys: BTreeMap<String, String>,
    directory: TempDir,
    /// Variables of all processes that start from now on.
    pub environment: Vec<(&'static str, String)>,
}

impl World {
    /// A world with topology and schema, and no worker yet.
    pub async fn new(tuning: Tuning) -> Self {
        Self::over(tuning, Carriage::RABBITMQ).await
    }

    /// The same over other carriers.
    pub async fn over(tuning: Tuning, carriage: Carriage) -> Self {
        let world = Self::bare(tuning, carriage).await;
        if carriage.uses(|carrier| !carrier.is_sqs()) {
            world.vhost.apply_topology().await;
            world.vhost.open().await;
        }
        if carriage.uses(Carrier::is_sqs) {
            world.queues.create().await;
        }
        world
    }

    /// A world whose broker has nothing but the virtual host.
    pub async fn without_topology(tuning: Tuning) -> Self {
        Self::bare(tuning, Carriage::RABBITMQ).await
    }

    /// A world whose brokers have nothing.
    pub async fn bare(tuning: Tuning, carriage: Carriage) -> Self {
        Self::at(tuning, carriage, Vhost::create().await, TestDb::create().await).await
    }

    /// A world with topology and schema, and no worker yet, at a broker of its own.
    pub async fn beside(tuning: Tuning, broker: &PrivateBroker) -> Self {
        let vhost = Vhost::create_on(&broker.amqp, &broker.api).await;
        Self::with_topology(tuning, vhost, TestDb::create().await).await
    }

    /// The same with a database on a server of its own.
    pub async fn on(tuning: Tuning, postgres: &PrivatePostgres) -> Self {
        Self::with_topology(tuning, Vhost::create().await, TestDb::create_on(&postgres.url).await).await
    }

    async fn with_topology(tuning: Tuning, vhost: Vhost, db: TestDb) -> Self {
        let world = Self::at(tuning, Carriage::RABBITMQ, vhost, db).await;
        world.vhost.apply_topology().await;
        world.vhost.open().await;
        world
    }

    async fn at(tuning: Tuning, carriage: Carriage, vhost: Vhost, db: TestDb) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let fake = Fake::start(directory.path()).await;
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes).unwrap();
        let world = Self {
            workers: Vec::new(),
            fake,
            vhost,
            queues: Queues::name(carriage.requests.contains(&Carrier::SqsFifo), carriage.events == Carrier::SqsFifo),
            proxy: Proxy::start().await,
            carriage,
            client: db.client().await,
            db,
            kek: hex::encode(bytes),
            published: Vec::new(),
            respelt: 0,
            redriven: 0,
            events: Vec::new(),
            dead: Vec::new(),
            secrets: vec![Secret { name: "the key-encryption key".into(), bytes: bytes.to_vec() }],
            dsm_keys: BTreeMap::new(),
            directory,
            environment: Vec::new(),
        };
        world.write("kek", &world.kek);
        world.write("keyferry.toml", &world.settings(tuning));
        world.write("settings.toml", &world.settings(tuning));
        world
    }

    /// A world with one worker that is ready.
    pub async fn with_worker(tuning: Tuning) -> Self {
        let mut world = Self::new(tuning).await;
        world.serve().await;
        world
    }

    fn settings(&self, tuning: Tuning) -> String {
        let Tuning { concurrency, lease_ms, aws_timeout_ms, signature_life_ms, grace_ms, visibility_s, pollers } =
            tuning;
        let rabbitmq = format!("[rabbitmq]\nurl = {:?}\napi_url = {:?}", self.vhost.url(), self.vhost.api_url());
        let sqs = format!(
            "[sqs]\nregion = {SQS_REGION:?}\nrequests_queue_url = {:?}\ndead_letter_queue_url = {:?}\n\
             events_queue_url = {:?}\nwait_s = 1\nvisibility_timeout_s = {visibility_s}\npollers = {pollers}",
            self.queues.url(Role::Requests),
            self.queues.url(Role::Dead),
            self.queues.url(Role::Events)
        );
        let from: Vec<&str> = self.carriage.requests.iter().map(|carrier| carrier.setting()).collect();
        format!(
            r#"
            policy = "allow-all"
            {UNGOVERNED}
            requests_from = {from:?}
            events_to = "{to}"
            {rabbitmq}
            {sqs}
            [database]
            url = "{worker}"
            owner_url = "{owner}"
            ca_file = "{ca}"
            [keys]
            kek_file = "{kek}"
            [[targets]]
            account = "{ACCOUNT}"
            regions = ["{REGION}", "us-east-1"]
            [[targets]]
            account = "{ACCOUNT}"
            partition = "aws-cn"
            regions = ["cn-north-1"]
            [worker]
            concurrency = {concurrency}
            lease_ms = {lease_ms}
            poll_ms = 100
            aws_timeout_ms = {aws_timeout_ms}
            signature_life_ms = {signature_life_ms}
            grace_ms = {grace_ms}
            [admin]
            listen = "127.0.0.1:0"
            [log]
            format = "json"
            filter = "info,keyferry=debug"
            "#,
            worker = self.db.worker_url(),
            owner = self.db.owner_url(),
            ca = variable("KEYFERRY_TEST_POSTGRES_CA"),
            to = self.carriage.events.setting(),
            rabbitmq = if self.carriage.uses(|carrier| !carrier.is_sqs()) { rabbitmq.as_str() } else { "" },
            sqs = if self.carriage.uses(Carrier::is_sqs) { sqs.as_str() } else { "" },
            kek = self.path("kek").display(),
        )
    }

    /// A file of this world.
    pub fn path(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join(name)
    }

    /// Writes a file of this world.
    pub fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    /// Adds to the settings of processes that start from now on; what was added before is replaced.
    pub fn configure(&self, more: &str) {
        let own = std::fs::read_to_string(self.path("settings.toml")).unwrap();
        self.write("keyferry.toml", &format!("{own}\n{more}"));
    }

    /// Replaces a text in the settings of processes that start from now on.
    pub fn respell(&self, from: &str, to: &str) {
        for name in ["settings.toml", "keyferry.toml"] {
            let own = std::fs::read_to_string(self.path(name)).unwrap();
            assert!(own.contains(from), "the settings do not say {from}");
            self.write(name, &own.replace(from, to));
        }
    }

    /// Puts a policy file into the place of `allow-all`, for processes that start from now on, with more lines for the
    /// transports' sections.
    pub fn with_policy(&self, policy: &str, senders: &str) {
        self.write("policy.toml", policy);
        let own = std::fs::read_to_string(self.path("settings.toml")).unwrap();
        let own = own.replacen("policy = \"allow-all\"", "policy = \"policy.toml\"", 1);
        let own = own.replacen("[rabbitmq]", &format!("[rabbitmq]\n{senders}"), 1);
        let own = own.replacen("[sqs]", &format!("[sqs]\n{senders}"), 1);
        self.write("settings.toml", &own);
        self.write("keyferry.toml", &own);
    }

    /// Writes another policy and has a worker load it.
    pub async fn load_policy(&self, at: usize, policy: &str) {
        let series = "keyferry_policy_reloads_total{result=\"loaded\"}";
        let before = self.workers[at].metric(series).await;
        self.write("policy.toml", policy);
        self.workers[at].signal(Signal::HUP);
        eventually("the policy is loaded", || async {
            (self.workers[at].metric(series).await > before + 0.5).then_some(())
        })
        .await;
    }

    /// The program with this world's settings and nothing else of this process's environment.
    pub fn command(&self) -> Command {
        let mut command = Command::new(keyferry());
        command
            .env_clear()
            .env("USER", "tester")
            .env("AWS_ENDPOINT_URL_KMS", self.fake.url())
            .env("AWS_ENDPOINT_URL_STS", self.fake.url())
            .env("AWS_ENDPOINT_URL_SQS", self.proxy.url())
            .env("AWS_ACCESS_KEY_ID", WORKER)
            .env("AWS_SECRET_ACCESS_KEY", SECRET)
            .env("AWS_REGION", REGION)
            .env("AWS_CONFIG_FILE", "/dev/null")
            .env("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
            .env("AWS_EC2_METADATA_DISABLED", "true")
            // Instead of the system's authorities, of which there are more than a hundred to be read at each start.
            .env("SSL_CERT_FILE", variable("KEYFERRY_TEST_POSTGRES_CA"))
            .envs(self.environment.iter().map(|(name, value)| (*name, value)))
            .current_dir(self.directory.path())
            .arg("--config")
            .arg(self.path("keyferry.toml"));
        command
    }

    /// Runs a command of the program to its end.
    pub async fn run(&self, arguments: &[&str]) -> Ran {
        self.run_with(arguments, &[], "").await
    }

    /// The same with environment variables and standard input.
    pub async fn run_with(&self, arguments: &[&str], environment: &[(&str, &str)], input: &str) -> Ran {
        let mut command = self.command();
        command.args(arguments).envs(environment.iter().copied());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let input = input.to_owned();
        tokio::task::spawn_blocking(move || {
            use std::io::Write as _;
            let mut child = command.spawn().unwrap();
            // A command that reads nothing may have closed it.
            drop(child.stdin.take().unwrap().write_all(input.as_bytes()));
            let output = child.wait_with_output().unwrap();
            Ran {
                code: output.status.code(),
                out: String::from_utf8_lossy(&output.stdout).into_owned(),
                err: String::from_utf8_lossy(&output.stderr).into_owned(),
            }
        })
        .await
        .unwrap()
    }

    /// Starts a worker and waits until it is ready; its place in `workers`.
    pub async fn serve(&mut self) -> usize {
        let at = self.start("").await;
        self.ready(at).await;
        at
    }

    /// Starts a worker, with failpoints as the crate `fail` writes them; waits for no more than its admin port.
    pub async fn start(&mut self, failpoints: &str) -> usize {
        let at = self.workers.len();
        let mut command = self.command();
        command.arg("serve");
        if !failpoints.is_empty() {
            command.env("FAILPOINTS", failpoints);
        }
        let mut process = Process::start(&mut command, self.path(&format!("worker-{at}.log")));
        // A failpoint can end it before the next look.
        let address = eventually("the worker's admin port", || {
            let (log, ended) = (process.log(), process.ended());
            async move {
                let found = log.lines().find_map(admin_address);
                assert!(found.is_some() || ended.is_none(), "the worker ended while starting:\n{log}");
                found
            }
        })
        .await;
        self.workers.push(Worker { process, address });
        at
    }

    /// Waits until a worker is ready.
    pub async fn ready(&self, at: usize) {
        eventually("the worker is ready", || async {
            self.workers[at].ready().await?.1.starts_with("ready").then_some(())
        })
        .await;
    }

    /// The store's time.
    pub async fn now(&self) -> OffsetDateTime {
        self.client.query_one("select keyferry_now()", &[]).await.unwrap().get(0)
    }

    /// A source key whose bytes the test holds, brought by the command that operators use.
    pub async fn import_key(&self, name: &str, kind: &str, bytes: &[u8]) {
        let arguments = ["keys", "import", "--name", name, "--kind", kind, "--file", "-", "--encoding", "hex"];
        let ran = self.run_with(&arguments, &[], &hex::encode(bytes)).await;
        assert_eq!(ran.code, Some(0), "{ran:?}");
    }

    /// A symmetric source key of random bytes.
    pub async fn symmetric_key(&self, name: &str) -> Vec<u8> {
        let bytes = random(32);
        self.import_key(name, "SYMMETRIC_DEFAULT", &bytes).await;
        bytes
    }

    /// Publishes a request.
    pub async fn publish(&mut self, request: Value) {
        self.send(Message { body: request.to_string().into_bytes(), ..Message::default() }).await;
    }

    /// Publishes any message.
    pub async fn send(&mut self, message: Message) {
        self.send_over(self.carriage.requests[0], message).await;
    }

    /// The same over one of several carriers.
    pub async fn send_over(&mut self, carrier: Carrier, message: Message) {
        match carrier {
            Carrier::RabbitMq => self.vhost.publish(&message).await,
            Carrier::Sqs | Carrier::SqsFifo => {
                // As publishers should: in order for each KMS key.
                let body: Value = serde_json::from_slice(&message.body).unwrap_or_default();
                let group = body["key"].as_str().filter(|key| key.starts_with("arn:")).unwrap_or("others");
                self.queues.send(&message, group).await;
            }
        }
        self.published.push(message);
    }

    /// Publishes many requests.
    pub async fn publish_all(&mut self, requests: Vec<Value>) {
        let message = |request: Value| Message { body: request.to_string().into_bytes(), ..Message::default() };
        let messages: Vec<Message> = requests.into_iter().map(message).collect();
        match self.carriage.requests[0] {
            Carrier::RabbitMq => {
                for message in &messages {
                    self.vhost.publish(message).await;
                }
            }
            Carrier::Sqs | Carrier::SqsFifo => self.queues.send_all(&messages).await,
        }
        self.published.extend(messages);
    }

    /// Publishes a message as a user of its own.
    pub async fn send_by(&mut self, user: &User, message: Message) {
        user.publish(&message).await.unwrap();
        self.published.push(message);
    }

    /// Messages that can be had from a queue of the first carrier.
    pub async fn ready_in(&self, role: Role) -> u32 {
        match (self.carriage.requests[0], role) {
            (Carrier::Sqs | Carrier::SqsFifo, role) => self.queues.ready(role).await,
            (Carrier::RabbitMq, Role::Dead) => self.vhost.ready(DEAD).await,
            (Carrier::RabbitMq, _) => self.vhost.ready(JOBS).await,
        }
    }

    /// Messages that wait for a worker at the brokers.
    pub async fn waiting(&self) -> u32 {
        let mut count = 0;
        for carrier in self.carriage.requests {
            count += match carrier {
                Carrier::RabbitMq => self.vhost.ready(JOBS).await,
                Carrier::Sqs | Carrier::SqsFifo => self.queues.ready(Role::Requests).await,
            };
        }
        count
    }

    /// The same with those that SQS hides, as from a worker that died.
    async fn left(&self) -> u32 {
        let over_sqs = self.carriage.requests.iter().any(|carrier| carrier.is_sqs());
        let hidden = if over_sqs { self.queues.hidden(Role::Requests).await } else { 0 };
        self.waiting().await + hidden
    }

    /// Notes messages that the program under test published.
    pub fn note_published(&mut self, bodies: impl IntoIterator<Item = Message>) {
        self.published.extend(bodies);
    }

    /// Says that one message was another spelling of one before.
    pub fn note_respelt(&mut self) {
        self.respelt += 1;
    }

    /// Says that messages were refused, and accepted when they were sent again.
    pub fn note_redriven(&mut self, count: usize) {
        self.redriven += count;
    }

    /// Tells what a KMIP server holds, as it goes to KMS: by `connection/identifier`.
    pub fn note_dsm_key(&mut self, id: &str, material: &[u8]) {
        self.dsm_keys.insert(id.to_owned(), hex::encode(sha2::Sha256::digest(material)));
        self.note_secret(&format!("the dsm key {id}"), material);
    }

    /// Names bytes that must be found nowhere.
    pub fn note_secret(&mut self, name: &str, bytes: &[u8]) {
        self.secrets.push(Secret { name: name.to_owned(), bytes: bytes.to_vec() });
    }

    /// The job of a request, if there is one.
    pub async fn job(&self, request_id: &str) -> Option<Job> {
        jobs(&self.client).await.into_iter().find(|job| job.request_id == request_id)
    }

    /// The job of a request, once it has ended.
    pub async fn ended(&self, request_id: &str) -> Job {
        eventually(&format!("{request_id} ends"), || async {
            self.job(request_id).await.filter(|job| job.state != "waiting")
        })
        .await
    }

    /// The job of a request, once it has succeeded.
    pub async fn succeeded(&self, request_id: &str) -> Job {
        let job = self.ended(request_id).await;
        assert_eq!(job.state, "succeeded", "{job:?}");
        job
    }

    /// The job of a request, once it has failed with this code.
    pub async fn failed(&self, request_id: &str, code: &str) -> Job {
        let job = self.ended(request_id).await;
        assert_eq!((job.state.as_str(), job.code()), ("failed", code), "{job:?}");
        job
    }

    /// The same for a job that looks again and again before it gives up.
    pub async fn failed_after_looking(&self, request_id: &str, code: &str) -> Job {
        self.ended_after_looking(request_id).await;
        self.failed(request_id, code).await
    }

    /// Lets no worker at the database, and ends their connections.
    pub async fn lock_postgres(&self) {
        self.allow_connections(false).await;
        let end = "select pg_terminate_backend(pid) from pg_stat_activity
                   where datname = current_database() and usename = 'keyferry_worker'";
        self.client.execute(end, &[]).await.unwrap();
    }

    /// Lets them again.
    pub async fn unlock_postgres(&self) {
        self.allow_connections(true).await;
    }

    async fn allow_connections(&self, are_allowed: bool) {
        let url = format!("{}?sslmode=require", variable("KEYFERRY_TEST_POSTGRES"));
        let server = connect(&url.parse().unwrap()).await;
        let database: String = self.client.query_one("select current_database()::text", &[]).await.unwrap().get(0);
        server.batch_execute(&format!("alter database {database} allow_connections {are_allowed}")).await.unwrap();
    }

    /// All refusals, once there are so many.
    pub async fn refused(&self, count: usize) -> Vec<Refusal> {
        eventually(&format!("{count} refusals"), || async {
            Some(refusals(&self.client).await).filter(|found| found.len() >= count)
        })
        .await
    }

    /// A value of the first row.
    pub async fn count(&self, sql: &str) -> i64 {
        self.client.query_one(sql, &[]).await.unwrap().get(0)
    }

    /// Waits until a count is as expected.
    pub async fn until(&self, what: &str, sql: &str, wanted: i64) {
        eventually(what, || async { (self.count(sql).await == wanted).then_some(()) }).await;
    }

    /// All events so far.
    pub async fn events(&mut self) -> &[Received] {
        let new = match self.carriage.events {
            Carrier::RabbitMq => self.vhost.take_events().await,
            Carrier::Sqs | Carrier::SqsFifo => self.queues.take(Role::Events).await,
        };
        self.events.extend(new);
        &self.events
    }

    /// The events about one request, once every event was told that the broker can route.
    pub async fn events_of(&mut self, request_id: &str) -> Vec<Value> {
        self.until("events are told", "select count(*) from outbox where held_because is null", 0).await;
        self.events_now(request_id).await
    }

    /// The events about one request so far.
    pub async fn events_now(&mut self, request_id: &str) -> Vec<Value> {
        let all = self.events().await.iter().map(Received::json);
        all.filter(|event| event["data"]["job"]["request_id"] == request_id).collect()
    }

    /// All dead letters so far.
    pub async fn dead(&mut self) -> &[Received] {
        for carrier in self.carriage.requests {
            let new = match carrier {
                Carrier::RabbitMq => self.vhost.take(DEAD).await,
                Carrier::Sqs | Carrier::SqsFifo => self.queues.take(Role::Dead).await,
            };
            self.dead.extend(new);
        }
        &self.dead
    }

    /// Waits until so many messages were dead-lettered.
    pub async fn dead_letters(&mut self, count: usize) -> Vec<Vec<u8>> {
        let end = std::time::Instant::now() + Duration::from_secs(40);
        while self.dead().await.len() < count {
            assert!(std::time::Instant::now() < end, "{} dead letters of {count}", self.dead.len());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.dead.iter().map(|message| message.body.clone()).collect()
    }

    /// Waits until nothing waits, stops all workers in order, and judges everything.
    pub async fn finish(mut self) {
        self.judge().await;
    }

    /// The same where the world goes on.
    pub async fn judge(&mut self) {
        let open = "select (select count(*) from outbox) + (select count(*) from line where due_at is not null)
                    + (select count(*) from future) + (select count(*) from progress)
                    + (select count(*) from refusal_fold where told_at is null)";
        for round in 0.. {
            assert!(round < 5, "messages come back with every stop");
            eventually("all messages are decided", || async { (self.left().await == 0).then_some(()) }).await;
            if self.count("select count(*) from refusal_fold where told_at is null").await > 0 {
                // Their minute is over then.
                self.db.advance(Duration::from_secs(60)).await;
            }
            eventually("everything is drained", || async {
                (self.left().await == 0 && self.count(open).await == 0).then_some(())
            })
            .await;
            for worker in &mut self.workers {
                if worker.is_running() {
                    worker.stop().await;
                }
            }
            // A message that was in hand is back.
            if self.left().await == 0 {
                break;
            }
            self.serve().await;
        }
        let refused = self.count("select count(*) from refused").await;
        self.dead_letters(usize::from(usize::try_from(refused).unwrap() > self.redriven)).await;
        let found = violations(&self.snapshot().await);
        assert!(found.is_empty(), "invariants are broken:\n{}", found.join("\n"));
    }

    /// Everything that is known now.
    pub async fn snapshot(&mut self) -> Snapshot {
        self.events().await;
        self.dead().await;
        let mut snapshot = Snapshot::of_store(&self.client, &self.db.store().await, &self.kek).await;
        snapshot.left.insert(JOBS.to_owned(), i64::from(self.left().await));
        for (at, worker) in self.workers.iter().enumerate() {
            snapshot.texts.push((format!("the log of worker {at}"), worker.log().into_bytes()));
        }
        snapshot.published.clone_from(&self.published);
        snapshot.respelt = self.respelt;
        snapshot.redriven = self.redriven;
        snapshot.events.clone_from(&self.events);
        snapshot.dead = self.dead.iter().map(|message| message.body.clone()).collect();
        snapshot.secrets.clone_from(&self.secrets);
        snapshot.dsm_keys.clone_from(&self.dsm_keys);
        snapshot.journal = self.fake.journal("").await;
        snapshot.kms_keys = self.fake.keys().await;
        snapshot
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        for (at, worker) in self.workers.iter().enumerate() {
            let log = worker.log();
            let lines: Vec<&str> = log.lines().collect();
            eprintln!("--- worker {at}\n{}", lines[lines.len().saturating_sub(40)..].join("\n"));
        }
        eprintln!("--- fake-kms\n{}", self.fake.log());
    }
}

/// What a line of the log says, in JSON or for people.
fn admin_address(line: &str) -> Option<String> {
    match serde_json::from_str::<Value>(line) {
        Ok(line) => line["admin.address"].as_str().map(str::to_owned),
        Err(_) => line.split(' ').find_map(|word| word.strip_prefix("admin.address=")).map(str::to_owned),
    }
}

/// Random bytes.
pub fn random(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    getrandom::fill(&mut bytes).unwrap();
    bytes
}

/// A request with an id for a key, and more fields.
pub fn request(id: &str, key: &str, more: Value) -> Value {
    let mut request = json!({"id": id, "key": key});
    if let (Some(request), Value::Object(more)) = (request.as_object_mut(), more) {
        request.extend(more);
    }
    request
}
