//! What a person asks of a connection: does it work, and what does it see?

use super::answers::count_located;
use super::certificate::{self, Holder};
use super::messages::{Ask, Version};
use super::session::{Endpoint, Session, SessionError, Setup, answers, general, given};
use super::{Dsm, DsmError};
use serde::Serialize;

/// Keys counted at most: with the longest identifiers they still fit into one message.
const MOST_KEYS: i32 = 250;

/// One server of a connection.
#[derive(Clone, Debug)]
pub struct ServerReport {
    /// `host:port`.
    pub server: String,
    /// What it says, or why nothing.
    pub outcome: Result<ServerDetails, DsmError>,
}

/// A server that answered.
#[derive(Clone, Debug, Serialize)]
pub struct ServerDetails {
    /// The version of KMIP that was agreed on.
    pub kmip_version: String,
    /// As TLS calls it.
    pub tls_version: String,
    /// The server's certificate, where it can be read.
    pub certificate: Option<Holder>,
    /// How many objects this client can see.
    pub visible_objects: usize,
    /// Whether there may be more than were counted.
    pub more_objects: bool,
}

impl Dsm {
    /// The connection's name, and a report on each of its servers, on a connection of its own each.
    pub async fn check(&self, connection: Option<&str>) -> Result<(String, Vec<ServerReport>), DsmError> {
        let connection = self.connection(connection)?;
        let mut reports = Vec::new();
        for (at, endpoint) in connection.pool.endpoints().enumerate() {
            let outcome = look(endpoint, connection.pool.setup()).await;
            reports.push(ServerReport {
                server: endpoint.to_string(),
                outcome: outcome.map_err(|error| connection.pool.fault(at, &error)),
            });
        }
        Ok((connection.name(), reports))
    }
}

async fn look(endpoint: &Endpoint, setup: &Setup) -> Result<ServerDetails, SessionError> {
    let mut session = Session::open(endpoint, setup).await?;
    let asks = [Ask::Locate { name: None, at_most: MOST_KEYS }];
    let response = session.exchange(&asks).await?;
    let found = match given(answers(&response, &asks)?.pop().flatten())? {
        Ok(found) => count_located(found),
        Err(refusal) if refusal.is_not_found() => 0,
        Err(refusal) => return Err(general(&refusal)),
    };
    let version: Version = session.version();
    let tls = session.tls();
    Ok(ServerDetails {
        kmip_version: version.to_string(),
        tls_version: tls.protocol_version().map(|version| format!("{version:?}")).unwrap_or_default(),
        certificate: tls.peer_certificates().and_then(|chain| certificate::holder(chain.first()?)),
        visible_objects: found,
        more_objects: usize::try_from(MOST_KEYS).is_ok_and(|most| found >= most),
    })
}
