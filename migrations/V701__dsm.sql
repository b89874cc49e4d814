-- Source keys that a KMIP server holds: what a job has chosen of them is kept by reference and fingerprint.

-- An older binary would not know which bytes such a job may import.
update schema_tolerance set oldest_binary = 701;

-- The server keeps the bytes: whether they are the same again is told by the fingerprint.
alter table progress add column dsm_connection text;
alter table progress add column dsm_key_id text;
alter table progress add column dsm_key_name text;
alter table progress add column dsm_fingerprint bytea;
alter table progress add column dsm_fingerprint_version integer;
alter table progress
    add check (num_nulls(dsm_connection, dsm_key_id, dsm_fingerprint, dsm_fingerprint_version) in (0, 4));
alter table progress add check (dsm_key_id is null or source_key_id is null);

grant select (dsm_connection, dsm_key_id, dsm_key_name) on progress to keyferry_reader;
