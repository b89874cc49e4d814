-- What operators do to jobs that have ended, or that cannot end: retries, jobs that are abandoned.

-- An older binary would tell of a retry as if it were the job that it retries, would forget what a failed job had
-- chosen, and would take an abandoned job for one that is only cancelled.
update schema_tolerance set oldest_binary = 921;

-- The failed job that this one does again. A job has one retry; where that fails, it is the one to be retried.
alter table job add column retry_of uuid;
create unique index job_retry_of on job (retry_of) where retry_of is not null;

-- What a failed job had committed itself to, so that its retry does the same and nothing else.
create table failed_choice (
    job_id uuid primary key,
    source_key_id uuid,
    dsm_connection text,
    dsm_key_id text,
    dsm_key_name text,
    dsm_fingerprint bytea,
    dsm_fingerprint_version integer,
    -- Which materials a delete meant, and those of them that AWS said it deleted.
    delete_ids text[],
    deleted_ids text[] not null,
    -- AWS answered all that the job asked of it; so the only material of a key without material ids is gone.
    is_answered boolean not null,
    check (num_nulls(dsm_connection, dsm_key_id, dsm_fingerprint, dsm_fingerprint_version) in (0, 4)),
    check (num_nonnulls(source_key_id, dsm_key_id, delete_ids) = 1)
);
grant select, insert on failed_choice to keyferry_worker;
grant select (job_id, source_key_id, dsm_connection, dsm_key_id, dsm_key_name, delete_ids, deleted_ids, is_answered)
    on failed_choice to keyferry_reader;

-- The job is to end whatever is in doubt: nobody expects any more to learn what AWS did.
alter table cancellation add column abandons boolean not null default false;
grant update (abandons) on cancellation to keyferry_worker;
