-- Rotations: new material under the same key, in all its Regions.

-- An older binary cannot read a rotate, and would end its line's turn with it.
update schema_tolerance set oldest_binary = 951;

comment on column progress.key_material_id is
    'the id that AWS gave the job''s material; of a rotate also while the material waits for its rotation';
-- RotateKeyOnDemand is about to be called, or was: with in_doubt, it may still take effect.
alter table progress add column rotation_sent boolean not null default false;
-- How far a rotate has come in the other Regions: Region to step.
alter table progress add column replicas jsonb;
grant select (rotation_sent, replicas) on progress to keyferry_reader;

-- Rotations on demand that AWS showed when it was last asked. A key has 25 for good.
alter table kms_key add column rotations integer;
create index kms_key_rotations on kms_key (rotations) where rotations >= 20;
grant update (rotations) on kms_key to keyferry_worker;
