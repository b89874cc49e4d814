-- The store: lanes, lines, jobs, requests, refusals, keys, outbox, audit.
--
-- A line is one KMS key (all Regions of a multi-Region key). Workers claim lines, never jobs: a
-- backlog of millions on one key is one row in the hot index. Jobs of a line carry a dense `seq`, so
-- the job at its head is one primary-key probe.
--
-- The roles keyferry_worker and keyferry_reader belong to the cluster; `ops/postgres/roles.sql` makes
-- them. The migrating role owns everything here.

-- One clock decides leases, delays and deadlines. Tests move `ahead`; nobody else may.
create table clock_offset (
    only_row boolean primary key default true check (only_row),
    ahead interval not null default '0'
);
insert into clock_offset default values;

create function keyferry_now() returns timestamptz
    language sql stable parallel safe
    -- Qualified: a temporary table of the same name must not be able to move the clock.
    as $$ select statement_timestamp() + ahead from public.clock_offset $$;

-- The oldest binary that may run on this schema. `serve` refuses to start below it.
create table schema_tolerance (
    only_row boolean primary key default true check (only_row),
    oldest_binary integer not null
);
insert into schema_tolerance (oldest_binary) values (201);

-- Jobs whose next scarce AWS call is the same operation in the same account and Region.
create table lane (
    id bigint generated always as identity primary key,
    account text not null,
    region text not null,
    operation text not null,
    open_at timestamptz not null default '-infinity',
    served_at timestamptz not null default '-infinity',
    -- No line of the lane is due before this. A hint: it keeps the scan away from dead index entries.
    scan_from timestamptz not null default '-infinity',
    unique (account, region, operation)
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200);

-- The name of a line: partition:account:key-id. Apart from `line`, whose row changes with every job:
-- each change would add an entry to this unique index too.
create table order_key (
    name text primary key,
    line_id bigint generated always as identity
);

create table line (
    id bigint primary key,
    lane_id bigint not null,
    head_seq bigint not null default 1,
    tail_seq bigint not null default 0,
    -- Empty line: null. Waiting: when its head may run. Leased: when the lease expires.
    due_at timestamptz,
    token uuid,
    -- Claims of the job at the head.
    attempt integer not null default 0,
    -- A mutating call that may still take effect: until when, and what it would do. Ends by time alone.
    late_until timestamptz,
    late_effect text,
    check (head_seq >= 1 and tail_seq >= head_seq - 1),
    check ((due_at is null) = (tail_seq < head_seq)),
    check (token is null or due_at is not null)
) with (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000,
        autovacuum_analyze_scale_factor = 0.05);
create index line_due on line (lane_id, due_at) where due_at is not null;

-- A KMS key as Keyferry knows it. Both names, ARN and id, lead to one line.
create table kms_key (
    id uuid primary key,
    arn text not null unique,
    line_id bigint not null,
    created_at timestamptz not null
);

-- The local store. Material is sealed under a data key, that under the key-encryption key.
create table source_key (
    id uuid primary key,
    name text not null unique,
    kind text not null,
    origin text not null check (origin in ('generated', 'imported')),
    sealed_material bytea,
    sealed_data_key bytea,
    kek_id text not null,
    fingerprint bytea not null,
    fingerprint_version integer not null,
    created_at timestamptz not null,
    deleted_at timestamptz,
    -- A deleted key keeps its name, so that a name never means other bytes.
    check ((deleted_at is null) = (sealed_material is not null)),
    check ((deleted_at is null) = (sealed_data_key is not null))
);

-- Keys for keyed hashes, sealed under the key-encryption key but independent of it.
create table fingerprint_key (
    version integer primary key,
    sealed_key bytea not null,
    kek_id text not null,
    created_at timestamptz not null
);

-- Written twice: when it is accepted and when it ends. Foreign keys would cost a tenth of the store's
-- time for every job; the statements that write them keep them true.
create table job (
    id uuid primary key,
    line_id bigint not null,
    -- Place in the line. Null while the job waits for its `not_before`.
    seq bigint,
    -- The lane in which its first scarce call is made.
    lane_id bigint not null,
    kms_key_id uuid not null,
    principal text not null,
    request_source text not null,
    request_id text not null,
    -- The request in canonical form: only the fields that were given.
    request text not null,
    traceparent text,
    state text not null default 'waiting' check (state in ('waiting', 'succeeded', 'failed')),
    accepted_at timestamptz not null,
    deadline timestamptz not null,
    source_key_id uuid,
    attempts integer not null default 0,
    finished_at timestamptz,
    result jsonb,
    error jsonb,
    unique (line_id, seq),
    check ((state = 'waiting') = (finished_at is null))
) with (fillfactor = 45, autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.05);

-- How far a job has come. Small, hot, emptied: a row from its first step to its end.
create table progress (
    job_id uuid primary key,
    -- Committed before any mutating call, so that every attempt imports the same bytes.
    source_key_id uuid,
    -- What the mutating call does: source key and expiry.
    effect text,
    -- A mutating call may have taken effect, or still may: set before it is made, cleared by an answer.
    in_doubt boolean not null default false,
    -- AWS answered that it took the material; what is left is to see it.
    imported boolean not null default false,
    key_material_id text,
    -- Sets of import parameters thrown away because AWS refused them.
    refreshes integer not null default 0,
    -- Entries of the audit trail about this job.
    audit_n integer not null,
    last_error jsonb,
    -- Public key and token of GetParametersForImport, kept for retries.
    wrapping_algorithm text,
    wrapping_key_spec text,
    public_key bytea,
    import_token bytea,
    parameters_valid_to timestamptz
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);
-- Short-lived rows: a trip through the overflow table would double their cost.
alter table progress alter column import_token set storage main;
create index progress_source on progress (source_key_id) where source_key_id is not null;

-- Jobs that join their line later.
create table future (
    job_id uuid primary key,
    not_before timestamptz not null
);
create index future_due on future (not_before);

-- Which materials Keyferry has put, or may have put, on a key. Fingerprints are keyed hashes.
create table kms_material (
    kms_key_id uuid not null,
    fingerprint bytea not null,
    fingerprint_version integer not null,
    source_tier text not null,
    source_key_id text not null,
    source_key_name text not null,
    key_material_id text,
    valid_to timestamptz,
    -- Null: a job ended without learning whether AWS took it.
    imported_at timestamptz,
    job_id uuid not null,
    primary key (kms_key_id, fingerprint)
);
create index kms_material_source on kms_material (source_key_id);

-- Idempotency: remembered for ever, survives the pruning of jobs.
create table request (
    principal text not null,
    id_hash bytea not null,
    digest bytea not null,
    digest_version smallint not null,
    job_id uuid not null,
    primary key (principal, id_hash)
);

-- A message that did not become a job. One row per verdict, however often it is sent.
create table refusal (
    id uuid primary key,
    principal text not null,
    id_hash bytea not null,
    digest bytea not null,
    code text not null,
    field text,
    message text not null,
    request_id text,
    ingress text not null,
    refused_at timestamptz not null,
    unique (principal, id_hash, digest, code)
);

-- Events that wait for the broker's confirmation. Small, hot, emptied.
create table outbox (
    id bigint generated always as identity primary key,
    event_id uuid not null,
    routing_key text not null,
    body text not null,
    -- When it may be published; while a relay publishes it, when that relay's lease ends.
    due_at timestamptz not null,
    attempts integer not null default 0,
    -- Why the last attempt did not succeed.
    held_because text
) with (fillfactor = 70, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);
-- Events that the broker could not take queue apart, so that a flood of them delays no other.
create index outbox_due on outbox (due_at) where held_because is null;
create index outbox_held on outbox (due_at) where held_because is not null;

-- The audit trail: a row is its canonical bytes; `subject` and `n` only find it, verification compares
-- them with the bytes. A column generated from the bytes would cost a third of the insert, the most frequent
-- of all. Sealing will add tables beside it and never change a row.
create table audit_entry (
    subject uuid not null,
    n integer not null check (n >= 1),
    entry text not null check (starts_with(entry, '{"at":"')),
    primary key (subject, n)
);

create function audit_is_append_only() returns trigger
    language plpgsql
    as $$ begin raise exception 'the audit trail is append-only' using errcode = 'KF001'; end $$;
create trigger audit_no_change before update or delete on audit_entry
    for each row execute function audit_is_append_only();
create trigger audit_no_truncate before truncate on audit_entry
    for each statement execute function audit_is_append_only();

revoke create on schema public from public;
do $$ begin execute format('revoke temporary on database %I from public', current_database()); end $$;
grant usage on schema public to keyferry_worker, keyferry_reader;

grant select on clock_offset, schema_tolerance, refinery_schema_history to keyferry_worker, keyferry_reader;
grant select, insert, update on lane, line, kms_material to keyferry_worker;
grant select, insert on order_key, kms_key, job, request, refusal, audit_entry, fingerprint_key, source_key
    to keyferry_worker;
grant update (seq, state, source_key_id, attempts, finished_at, result, error) on job to keyferry_worker;
-- Locking a row needs the right to update it; deletion erases the seals and keeps the rest.
grant update (sealed_material, sealed_data_key, deleted_at) on source_key to keyferry_worker;
grant select, insert, update, delete on future, progress, outbox to keyferry_worker;

grant select on lane, order_key, line, kms_key, job, future, request, refusal, outbox, audit_entry
    to keyferry_reader;
grant select (id, name, kind, origin, kek_id, created_at, deleted_at) on source_key to keyferry_reader;
grant select (kms_key_id, source_tier, source_key_id, source_key_name, key_material_id, valid_to, imported_at, job_id)
    on kms_material to keyferry_reader;
grant select (job_id, source_key_id, effect, in_doubt, imported, key_material_id, refreshes, audit_n, last_error,
        wrapping_algorithm, wrapping_key_spec, parameters_valid_to)
    on progress to keyferry_reader;
