//! The operations of STS.

use serde::Deserialize;
use serde_json::json;

use crate::kinds::rfc3339;
use crate::operations::{Done, Halt, Work};
use crate::refusal;
use crate::request::{parse, required};
use crate::roles::Wanted;
use crate::world::State;

/// A form's values are texts.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct AssumeRole {
    role_arn: Option<String>,
    role_session_name: Option<String>,
    external_id: Option<String>,
    duration_seconds: Option<String>,
}

/// `AssumeRole`.
pub fn assume_role(state: &mut State, work: &Work<'_>) -> Result<Done, Halt> {
    let request: AssumeRole = parse(&work.call.body)?;
    let role = required(request.role_arn, "roleArn")?;
    let name = required(request.role_session_name, "roleSessionName")?;
    let seconds = match request.duration_seconds.as_deref().map(str::parse) {
        None => 3_600,
        Some(Ok(seconds)) if (900..=43_200).contains(&seconds) => seconds,
        Some(_) => {
            let rule = "Member must have value greater than or equal to 900 and less than or equal to 43200";
            return Err(refusal::constraint("[seconds]", "durationSeconds", rule).into());
        }
    };
    let wanted = Wanted { role: &role, name: &name, external_id: request.external_id.as_deref(), seconds };
    let (access_key, session) = state.roles.assume(&work.call.principal, &wanted, work.now)?;
    Ok(json!({
        "AssumedRoleUser": { "AssumedRoleId": format!("AROAFAKE:{name}"), "Arn": session.principal.arn() },
        "Credentials": {
            "AccessKeyId": access_key,
            "SecretAccessKey": session.secret,
            "SessionToken": session.token,
            "Expiration": rfc3339(session.ends_at),
        },
    })
    .into())
}

/// `GetCallerIdentity`.
pub fn get_caller_identity(work: &Work<'_>) -> Done {
    let principal = &work.call.principal;
    json!({ "Arn": principal.arn(), "UserId": &*principal.access_key, "Account": &*principal.account }).into()
}
