-- A database for Keyferry, named by the environment variable KEYFERRY_DATABASE (default: keyferry), unless it is there.
-- Run by psql as a superuser after roles.sql. Its owner owns the schema `public`, so that migrations run as
-- keyferry_owner; nobody but the three roles may connect.

\set ON_ERROR_STOP on
\set database keyferry
\getenv database KEYFERRY_DATABASE

select format('create database %I owner keyferry_owner', :'database')
where not exists (select from pg_database where datname = :'database')
\gexec

revoke connect, temporary on database :"database" from public;
grant connect on database :"database" to keyferry_worker, keyferry_reader;
