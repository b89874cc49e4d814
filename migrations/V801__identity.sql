-- Who asks: the identity behind each job and each refusal, and which policies workers have loaded.

-- An older binary would run jobs of principals that are no longer allowed anything: it judges none.
update schema_tolerance set oldest_binary = 801;

-- As the identity is printed: `rabbitmq:payroll`, `aws:AROA...`, `key:payroll-2026`. Null where nobody was asked.
alter table job add column identity text;

-- The same; where it was not verified, what the message says of itself, printable and cut.
alter table refusal add column identity text;
alter table refusal add column identity_verified boolean not null default false;
-- The digest of the policy that was in force; null in rows from before.
alter table refusal add column policy text;
alter table refusal add check (identity is not null or not identity_verified);

-- Two senders that nobody knows are both `unidentified`: their messages are two refusals, since each may be sent again in
-- its own sender's name.
alter table refusal drop constraint refusal_principal_id_hash_digest_code_key;
alter table refusal add constraint refusal_once
    unique nulls not distinct (principal, id_hash, digest, code, identity, identity_verified);

-- When a worker last began to judge by each policy. One that judges by an older one than the newest ends nobody's job.
create table policy_load (
    digest text primary key,
    loaded_at timestamptz not null
);

grant select, insert on policy_load to keyferry_worker;
grant update (loaded_at) on policy_load to keyferry_worker;
grant select on policy_load to keyferry_reader;
