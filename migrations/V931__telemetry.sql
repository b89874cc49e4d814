-- Which materials expire next: looked at once a minute, a bounded part from the end that is nearest.

create index kms_material_expiry on kms_material (valid_to, kms_key_id) where valid_to is not null and removed_at is null;
