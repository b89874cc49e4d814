//! A database of its own for every test.
//!
//! Each is a copy of one migrated template, which the first test process of a run makes: migrating takes
//! several times as long as copying. The template's name holds a hash of the migrations, so that a server
//! that outlives a change of them serves both.

use keyferry::config::Database;
use keyferry::store::{Store, migrate};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio_postgres::Client;
use tokio_postgres_rustls::MakeRustlsConnect;
use url::Url;
use uuid::Uuid;

/// Test processes that want the template wait for each other on this.
const ADVISORY_LOCK: i64 = 0x6B66_7465_6D70_6C61;

/// A database that lives as long as this value. Its owner is `keyferry_owner`.
pub struct TestDb {
    name: String,
    /// The superuser's URL of its server.
    server: Url,
}

impl TestDb {
    /// A migrated database.
    pub async fn create() -> Self {
        Self::create_on(&server()).await
    }

    /// A migrated database on a server of which this is the superuser's URL.
    pub async fn create_on(server: &Url) -> Self {
        let admin = connect(&superuser_url(server, "postgres")).await;
        let template = template(&admin, server).await;
        Self::make(&admin, server, &format!("template {template}")).await
    }

    /// A database without a schema of ours.
    pub async fn create_empty() -> Self {
        let server = server();
        Self::make(&connect(&superuser_url(&server, "postgres")).await, &server, "").await
    }

    async fn make(admin: &Client, server: &Url, options: &str) -> Self {
        let made = Self { name: format!("test_{}", Uuid::new_v4().simple()), server: server.clone() };
        make_database(admin, &made.name, options).await;
        made
    }

    /// Settings of a worker and of a migrating owner on this database.
    pub fn settings(&self) -> Database {
        Database {
            url: Some(self.worker_url().into()),
            owner_url: Some(self.owner_url().into()),
            ca_file: Some(ca_file()),
            ..Database::default()
        }
    }

    /// As `keyferry_worker`.
    pub fn worker_url(&self) -> String {
        self.role_url("keyferry_worker", "KEYFERRY_TEST_WORKER_PASSWORD")
    }

    /// As `keyferry_owner`.
    pub fn owner_url(&self) -> String {
        self.role_url("keyferry_owner", "KEYFERRY_TEST_OWNER_PASSWORD")
    }

    /// As `keyferry_reader`.
    pub fn reader_url(&self) -> String {
        self.role_url("keyferry_reader", "KEYFERRY_TEST_READER_PASSWORD")
    }

    fn role_url(&self, role: &str, password: &str) -> String {
        let mut url = superuser_url(&self.server, &self.name);
        url.set_username(role).unwrap();
        url.set_password(Some(&variable(password))).unwrap();
        url.into()
    }

    /// A pool of the worker's role.
    #[expect(clippy::unused_async, reason = "a test must not have to know whether this connects")]
    pub async fn store(&self) -> Store {
        Store::new(&self.worker_url(), &self.settings()).unwrap()
    }

    /// The superuser on this database.
    pub async fn client(&self) -> Client {
        connect(&superuser_url(&self.server, &self.name)).await
    }

    /// Moves this database's clock ahead, for all who use it.
    pub async fn advance(&self, by: Duration) {
        let milliseconds = by.as_secs_f64() * 1_000.0;
        let moved = self
            .client()
            .await
            .execute("update clock_offset set ahead = ahead + $1 * interval '1 ms'", &[&milliseconds])
            .await
            .unwrap();
        assert_eq!(moved, 1);
    }
}

impl Drop for TestDb {
    /// Best effort: a database that is left goes with its server.
    fn drop(&mut self) {
        let (name, server) = (self.name.clone(), self.server.clone());
        // A test's own runtime cannot be blocked on from within it.
        let dropping = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let Ok(runtime) = runtime else { return };
            runtime.block_on(async {
                let Ok(admin) = try_connect(&superuser_url(&server, "postgres")).await else { return };
                drop(admin.batch_execute(&format!("drop database if exists {name} with (force)")).await);
            });
        });
        drop(dropping.join());
    }
}

/// Connects to any database of the test server by a URL; the connection's task is spawned.
pub async fn connect(url: &Url) -> Client {
    try_connect(url).await.unwrap()
}

/// As [`connect`], for those who expect to be turned away.
pub async fn try_connect(url: &Url) -> Result<Client, tokio_postgres::Error> {
    let config: tokio_postgres::Config = url.as_str().parse()?;
    let tls = MakeRustlsConnect::new(keyferry::tls::client_config(Some(&ca_file())).unwrap());
    let (client, connection) = config.connect(tls).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// The authority that signed the test server's certificate.
pub fn ca_file() -> PathBuf {
    variable("KEYFERRY_TEST_POSTGRES_CA").into()
}

/// The run's server.
fn server() -> Url {
    Url::parse(&variable("KEYFERRY_TEST_POSTGRES")).unwrap()
}

fn superuser_url(server: &Url, database: &str) -> Url {
    let mut url = server.clone();
    url.set_path(database);
    url.set_query(Some("sslmode=require"));
    url
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: run the tests through ops/test"))
}

/// As `ops/postgres/database.sql` does it: rights on a database are not copied with it.
async fn make_database(admin: &Client, name: &str, options: &str) {
    for statement in [
        format!("create database {name} owner keyferry_owner {options}"),
        format!("revoke connect, temporary on database {name} from public"),
        format!("grant connect on database {name} to keyferry_worker, keyferry_reader"),
    ] {
        admin.batch_execute(&statement).await.unwrap();
    }
}

/// The name of the migrated template, which is made unless it is there.
async fn template(admin: &Client, server: &Url) -> String {
    let mut hasher = DefaultHasher::new();
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations");
    let mut files: Vec<PathBuf> = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort_unstable();
    for file in files {
        file.file_name().hash(&mut hasher);
        std::fs::read(file).unwrap().hash(&mut hasher);
    }
    let name = format!("template_{:016x}", hasher.finish());
    let exists = "select from pg_database where datname = $1";
    if admin.query_opt(exists, &[&name]).await.unwrap().is_some() {
        return name;
    }
    admin.execute("select pg_advisory_lock($1)", &[&ADVISORY_LOCK]).await.unwrap();
    if admin.query_opt(exists, &[&name]).await.unwrap().is_none() {
        // Under another name until it is whole: its maker may be killed.
        let making = format!("{name}_making");
        admin.batch_execute(&format!("drop database if exists {making} with (force)")).await.unwrap();
        make_database(admin, &making, "").await;
        // Not to be dropped: `TestDb` stands here only for its URLs.
        let database = std::mem::ManuallyDrop::new(TestDb { name: making.clone(), server: server.clone() });
        migrate(&database.owner_url(), &database.settings()).await.unwrap();
        rename(admin, &making, &name).await;
    }
    admin.execute("select pg_advisory_unlock($1)", &[&ADVISORY_LOCK]).await.unwrap();
    name
}

/// The migrating connection may not have quite ended, and a database in use is not renamed.
async fn rename(admin: &Client, from: &str, to: &str) {
    let gone = "select not exists (select from pg_stat_activity where datname = $1)";
    while !admin.query_one(gone, &[&from]).await.unwrap().get::<_, bool>(0) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    admin.batch_execute(&format!("alter database {from} rename to {to}")).await.unwrap();
}
