//! Jobs that look for what AWS does not show: their time is made to pass.

use super::eventually;
use super::snapshot::Job;
use super::world::World;
use std::time::Duration;

impl World {
    /// The job of a request that looks again and again, once it has ended. The store's clock runs ahead meanwhile.
    pub async fn ended_after_looking(&self, request_id: &str) -> Job {
        let ended = "select count(*) from job where request_id = $1 and state <> 'waiting'";
        self.look_until(ended, request_id).await;
        self.ended(request_id).await
    }

    /// Lets jobs that look for what AWS does not show go on until a count is one.
    pub async fn look_until(&self, query: &str, value: &str) {
        // All but the last of a hundred looks.
        let hurry = "update progress set last_error = jsonb_set(last_error, '{times}', '98')
                     where last_error ->> 'class' = 'not_yet_visible'
                       and (last_error ->> 'times')::integer between 14 and 97";
        eventually(&format!("{value} gives up"), || async {
            self.db.advance(Duration::from_secs(16)).await;
            self.client.execute(hurry, &[]).await.unwrap();
            // For the worker to see it, and to end its attempt under the lease that it was given.
            tokio::time::sleep(Duration::from_millis(150)).await;
            let count: i64 = self.client.query_one(query, &[&value]).await.unwrap().get(0);
            (count == 1).then_some(())
        })
        .await;
    }
}
