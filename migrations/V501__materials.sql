-- A symmetric key may be tied to several materials; each can be missing, deleted and imported again by itself.

-- An older binary would leave `removed_at` behind when it imports again, and cannot read deletes and dry runs.
update schema_tolerance set oldest_binary = 501;

-- Since when AWS says, or has said to a delete of ours, that it is not there; null while it may be there. The key stays
-- tied to it all the same.
alter table kms_material add column removed_at timestamptz;

-- All Regions of a multi-Region key share their materials, and their line.
create index kms_key_line on kms_key (line_id);

-- Which materials a delete means, committed before the first call; empty: the one of a key without material ids.
alter table progress add column delete_ids text[];
-- Those of them that AWS said it deleted: they are not deleted a second time.
alter table progress add column deleted_ids text[] not null default '{}';
comment on column progress.imported is 'AWS answered every mutating call of the job; what is left is to see it';
comment on column progress.effect is 'what the mutating calls do: equal texts mean that repeating them changes nothing';

grant select (removed_at) on kms_material to keyferry_reader;
grant select (delete_ids, deleted_ids) on progress to keyferry_reader;
