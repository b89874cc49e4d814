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
    primary key (line_id, seq)
) with (fillfactor = 70, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200);

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
