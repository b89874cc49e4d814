-- Floods: refusals beyond the first of a minute are told of together, and the jobs that wait are counted by account and
-- Region too.

-- An older binary would leave refusals behind that fold no more, and would not count by account and Region.
update schema_tolerance set oldest_binary = 911;

-- Whose refusals, and for which reason. Whoever writes refusals locks these rows first, so that each is counted once.
create table refusal_meter (
    principal text not null,
    -- As it is printed; empty where nothing was proved. What a message only says of itself makes no row here.
    identity text not null,
    ingress text not null,
    code text not null,
    -- The minute that is counted, how many refusals it has seen, and its fold if these are more than are told of one by one.
    minute timestamptz not null,
    seen bigint not null,
    fold_id uuid,
    -- How many rows of refusal_folded there are.
    kept bigint not null,
    primary key (principal, identity, ingress, code)
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200);

-- Refusals that have one audit entry and one event together, once their minute is over.
create table refusal_fold (
    id uuid primary key,
    principal text not null,
    -- Null where nothing was proved.
    identity text,
    ingress text not null,
    code text not null,
    -- The digest of the policy that was last in force.
    policy text not null,
    minute timestamptz not null,
    first_at timestamptz not null,
    last_at timestamptz not null,
    count bigint not null check (count >= 1),
    -- How many of them have no row in refusal_folded, or none any more.
    forgotten bigint not null check (forgotten between 0 and count),
    told_at timestamptz
) with (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000);
create index refusal_fold_open on refusal_fold (minute, id) where told_at is null;
create index refusal_fold_forgotten on refusal_fold (minute) where forgotten > 0;

-- What is remembered of each of them, for its dead letter and for copies of it. Bounded in number, and in time.
create table refusal_folded (
    id uuid primary key,
    fold_id uuid not null,
    principal text not null,
    id_hash bytea not null,
    digest bytea not null,
    code text not null,
    field text,
    request_id text,
    ingress text not null,
    identity text,
    identity_verified boolean not null,
    refused_at timestamptz not null,
    check (identity is not null or not identity_verified)
);
-- As of refusals, and in the order in which letters are looked up.
create unique index refusal_folded_once on refusal_folded
    (id_hash, digest, principal, code, identity, identity_verified) nulls not distinct;
create index refusal_folded_age on refusal_folded (refused_at);

-- Every refusal that is remembered, told of by itself or not.
create view refused as
    select id, principal, id_hash, digest, code, field, message, request_id, ingress, identity, identity_verified,
           refused_at, null::uuid as fold_id
    from refusal
    union all
    select id, principal, id_hash, digest, code, field,
           'refused as the others of its minute that have this code: they have one audit entry and one event together',
           request_id, ingress, identity, identity_verified, refused_at, fold_id
    from refusal_folded;

-- Where the jobs are whose number changes. Null in changes from before, which lane_backlog holds already.
alter table backlog_change add column account text;
alter table backlog_change add column region text;
create index backlog_change_lane on backlog_change (account, region) include (change);
create table lane_backlog (
    account text not null,
    region text not null,
    waiting bigint not null,
    primary key (account, region)
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200);
insert into lane_backlog (account, region, waiting)
select split_part(arn, ':', 5), split_part(arn, ':', 4), count(*)
from job join kms_key on kms_key.id = job.kms_key_id where job.state = 'waiting' group by 1, 2;

grant select, insert on refusal_meter, refusal_fold to keyferry_worker;
grant update (minute, seen, fold_id, kept) on refusal_meter to keyferry_worker;
grant update (policy, last_at, count, forgotten, told_at) on refusal_fold to keyferry_worker;
grant select, insert, update on lane_backlog to keyferry_worker;
grant select, insert, delete on refusal_folded to keyferry_worker;
grant select on refused to keyferry_worker;
grant select on refusal_meter, refusal_fold, refusal_folded, refused, lane_backlog to keyferry_reader;
