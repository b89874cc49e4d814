-- The three roles of Keyferry. They belong to the cluster, not to a database, so migrations only grant to them.
-- Run by psql as a superuser; running it again changes nothing but the passwords that are given:
--
--     KEYFERRY_OWNER_PASSWORD=... KEYFERRY_WORKER_PASSWORD=... KEYFERRY_READER_PASSWORD=... psql -f ops/postgres/roles.sql
--
-- Passwords come by the environment, never by arguments, which every process on the machine can read. One that is not
-- set is left as it is. A ready SCRAM-SHA-256 verifier may be given instead of a password.

\set ON_ERROR_STOP on
\set ECHO none

-- keyferry_owner   owns the database and its schema; runs migrations
-- keyferry_worker  reads and writes what a worker needs; no DDL
-- keyferry_reader  reads everything but key material
select format('create role %I login', name)
from (values ('keyferry_owner'), ('keyferry_worker'), ('keyferry_reader')) as wanted (name)
where not exists (select from pg_roles where rolname = name)
\gexec

alter role keyferry_owner login;
alter role keyferry_worker login;
alter role keyferry_reader login;

\getenv owner_password KEYFERRY_OWNER_PASSWORD
\getenv worker_password KEYFERRY_WORKER_PASSWORD
\getenv reader_password KEYFERRY_READER_PASSWORD

begin;
-- The statements below hold passwords: keep them out of the server's log, and of pg_stat_statements where that is loaded.
set local log_statement = 'none';
set local log_min_duration_statement = -1;
set local log_min_duration_sample = -1;
set local log_transaction_sample_rate = 0;
set local log_min_error_statement = 'panic';
set local pg_stat_statements.track_utility = off;
set local password_encryption = 'scram-sha-256';
\if :{?owner_password}
alter role keyferry_owner password :'owner_password';
\endif
\if :{?worker_password}
alter role keyferry_worker password :'worker_password';
\endif
\if :{?reader_password}
alter role keyferry_reader password :'reader_password';
\endif
commit;

\unset owner_password
\unset worker_password
\unset reader_password
