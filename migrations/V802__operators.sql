-- What operators do to jobs that wait: deletes that overtake their line.
--
-- Numbered after the newest that is applied anywhere: a lower number would be refused where that one is.

-- An older binary would take the job at the head of a line for the one that is leased, and would not pass over jobs
-- that ended out of turn.
update schema_tolerance set oldest_binary = 802;

-- Jobs that overtake their line, the lowest place first. Small, hot, emptied: nearly always empty.
create table urgent (
    line_id bigint not null,
    seq bigint not null,
    -- Claims of the job. Those of the job at the head are counted in the line.
    attempt integer not null default 0,
    -- The hold by which it was found held: until that is released it overtakes nobody.
    parked_by uuid,
    primary key (line_id, seq)
) with (fillfactor = 70, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200);
create index urgent_parked on urgent (parked_by, line_id) where parked_by is not null;

-- The urgent job that runs under the lease; null: the job at the head does.
alter table line add column urgent_seq bigint;
alter table line add check (urgent_seq is null or token is not null);
-- When and in which lane the job at the head is to run, while urgent jobs have taken its place.
alter table line add column head_due_at timestamptz;
alter table line add column head_lane_id bigint;
alter table line add check ((head_due_at is null) = (head_lane_id is null));
comment on column line.attempt is 'claims of the job at the head; those of an urgent job are counted in urgent';

grant select, insert, update, delete on urgent to keyferry_worker;
grant select on urgent to keyferry_reader;

-- Jobs that are to end as cancelled as soon as nothing is in doubt: those that a worker has under way, and those of
-- which a call was not answered. Small, hot, emptied: nearly always empty.
create table cancellation (
    job_id uuid primary key,
    requested_at timestamptz not null
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200);
grant select, insert, delete on cancellation to keyferry_worker;
grant select on cancellation to keyferry_reader;

-- Jobs that are followed, waited for and cancelled together. Changes of a job's state leave this index alone.
alter table job add column batch text;
update job set batch = request::jsonb ->> 'batch' where request like '%"batch":%';
create index job_batch on job (batch, id) where batch is not null;

-- What operators have stopped. A hold is in force until it is released; its row stays.
create table hold (
    id uuid primary key,
    scope text not null check (scope in ('everything', 'account', 'region', 'principal', 'key')),
    -- Empty for everything; of a key, the name of its line.
    value text not null check ((value = '') = (scope = 'everything')),
    reason text,
    held_by text not null,
    held_at timestamptz not null,
    released_by text,
    released_at timestamptz,
    check ((released_by is null) = (released_at is null))
);
create unique index hold_in_force on hold (scope, value) where released_at is null;

-- The hold by which the line's next job was found held: the line is due at no time until that is released.
alter table line add column parked_by uuid;
alter table line add check (parked_by is null or token is null);
alter table line add check ((due_at = 'infinity') = (parked_by is not null));
create index line_parked on line (parked_by, id) where parked_by is not null;

grant select, insert on hold to keyferry_worker;
grant update (released_by, released_at) on hold to keyferry_worker;
grant select on hold to keyferry_reader;

-- How many jobs of each principal wait: the row and what is still to be folded into it.
create table backlog (
    principal text primary key,
    waiting bigint not null
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200);
create table backlog_change (
    id bigint generated always as identity primary key,
    principal text not null,
    change bigint not null
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);
-- One principal's changes, however many the others have.
create index backlog_change_principal on backlog_change (principal) include (change);
insert into backlog (principal, waiting)
select principal, count(*) from job where state = 'waiting' group by principal;
grant select, insert, update on backlog to keyferry_worker;
-- Locking a row needs the right to update it.
grant select, insert, update, delete on backlog_change to keyferry_worker;
grant select on backlog, backlog_change to keyferry_reader;
