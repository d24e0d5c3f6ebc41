//! A loop over tasks on the threads of rayon's pool, begun and ended in well under a microsecond.
//!
//! A token passes through some hundred parallel loops of tens to hundreds of microseconds each. rayon's workers go to sleep between two of
//! them and take tens of microseconds to wake, all of them where one was asked for. Here they linger: a loop asks workers of the pool for
//! help, and those who come stay for the next loops of the same thread until none has begun for [`LINGER`]. Nobody waits for helpers who
//! have not come (the pool may be busy), so a loop is as fast as the thread alone in the worst case. Loops do not nest: a loop inside a task
//! runs on the task's thread.

use std::{
    cell::{Cell, UnsafeCell},
    hint, mem,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// How long helpers wait for another loop: longer than what lies between two forward passes, where a server draws and sends tokens.
const LINGER: Duration = Duration::from_millis(2);
/// How long they wait before they offer the core to others: longer than what lies between two loops of a forward pass.
const ALONE: Duration = Duration::from_micros(50);
/// Turns of a waiting loop between two looks at the clock, or two offers of the core to others.
const TURNS: u32 = 64;

thread_local! {
    static TEAM: Arc<Team> = Arc::default();
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Calls `task` once for each of `0..tasks`, on this thread and on whatever threads of rayon's current pool come to help.
pub(crate) fn parallel<F: Fn(usize) + Sync>(tasks: usize, task: F) {
    let helpers = rayon::current_num_threads() - 1;
    if tasks <= 1 || helpers == 0 || INSIDE.get() {
        (0..tasks).for_each(task);
    } else {
        TEAM.with(|team| team.lead(tasks, &task, helpers));
    }
}

/// Calls `task` for each piece of `length` elements (the last may be shorter) and its number, in parallel.
pub(crate) fn parallel_pieces<F: Fn(usize, &mut [f32]) + Sync>(data: &mut [f32], length: usize, task: F) {
    struct Start(*mut f32);
    // SAFETY: pieces do not overlap, and each is given to one task.
    unsafe impl Sync for Start {}
    impl Start {
        fn at(&self, offset: usize) -> *mut f32 {
            self.0.wrapping_add(offset)
        }
    }
    let (total, start) = (data.len(), Start(data.as_mut_ptr()));
    parallel(total.div_ceil(length), |piece| {
        let offset = piece * length;
        // SAFETY: within `data`, which is borrowed until all tasks have ended.
        task(piece, unsafe { std::slice::from_raw_parts_mut(start.at(offset), length.min(total - offset)) });
    });
}

/// What `make` makes of each item, in parallel.
///
/// # Panics
/// If `make` does, on the thread that called, when all items are done.
pub fn parallel_map<T: Send, R: Send>(items: Vec<T>, make: impl Fn(T) -> R + Sync) -> Vec<R> {
    let items: Vec<_> = items.into_iter().map(|item| Mutex::new((Some(item), None))).collect();
    parallel(items.len(), |i| {
        // Nobody else asks for this one; a panic of a helper's would end the process.
        let mut place = items[i].lock().unwrap_or_else(PoisonError::into_inner);
        place.1 = place.0.take().map(|item| catch_unwind(AssertUnwindSafe(|| make(item))));
    });
    let made = items.into_iter().filter_map(|place| place.into_inner().unwrap_or_else(PoisonError::into_inner).1);
    made.map(|made| made.unwrap_or_else(|panic| resume_unwind(panic))).collect()
}

type Task<'a> = &'a (dyn Fn(usize) + Sync);

/// One thread's loops and those who help with them.
#[derive(Default)]
struct Team {
    /// Odd while a loop is open.
    epoch: AtomicUsize,
    /// Written by the leader, and only while no loop is open and nobody is inside.
    task: UnsafeCell<Option<Task<'static>>>,
    tasks: AtomicUsize,
    next: AtomicUsize,
    /// Helpers that may be looking at `task`.
    inside: AtomicUsize,
    /// Helpers that have come or been asked for.
    helpers: AtomicUsize,
}

// SAFETY: `task` is the only field that is not `Sync` by itself; it is written and read as said there, which `lead` and `help` see to.
unsafe impl Sync for Team {}
// SAFETY: as above; what `task` points to is `Sync`.
unsafe impl Send for Team {}

impl Team {
    fn lead(self: &Arc<Self>, tasks: usize, task: Task<'_>, helpers: usize) {
        // SAFETY: only the lifetime changes. Nobody calls the task after `Close` is dropped, which is before this function returns or unwinds.
        let task: Task<'static> = unsafe { mem::transmute::<Task<'_>, Task<'static>>(task) };
        // SAFETY: the last loop was closed when nobody was inside, and nobody enters before the next one is open.
        unsafe { *self.task.get() = Some(task) };
        self.tasks.store(tasks, Ordering::Relaxed);
        self.next.store(0, Ordering::Relaxed);
        self.epoch.fetch_add(1, Ordering::SeqCst);
        let close = Close(self);
        while self.helpers.load(Ordering::Relaxed) < helpers {
            self.helpers.fetch_add(1, Ordering::Relaxed);
            let team = self.clone();
            rayon::spawn(move || team.help());
        }
        self.work(task);
        drop(close);
    }

    fn work(&self, task: Task<'_>) {
        INSIDE.set(true);
        let tasks = self.tasks.load(Ordering::Relaxed);
        loop {
            let next = self.next.fetch_add(1, Ordering::Relaxed);
            if next >= tasks {
                break;
            }
            task(next);
        }
        INSIDE.set(false);
    }

    fn help(&self) {
        let (mut last, mut turn) = (0, 0u32);
        let mut idle = Instant::now();
        loop {
            let epoch = self.epoch.load(Ordering::SeqCst);
            if epoch % 2 == 1 && epoch != last {
                last = epoch;
                self.inside.fetch_add(1, Ordering::SeqCst);
                let leave = Leave(self);
                // Whoever closes the loop does so before looking who is inside: if it is still open now, the leader will wait.
                if self.epoch.load(Ordering::SeqCst) == epoch {
                    // SAFETY: written before the loop was opened, and not written again while this helper is inside.
                    if let Some(task) = unsafe { *self.task.get() } {
                        self.work(task);
                    }
                }
                drop(leave);
                idle = Instant::now();
            }
            hint::spin_loop();
            turn = turn.wrapping_add(1);
            if turn.is_multiple_of(TURNS) {
                let idle = idle.elapsed();
                if idle > LINGER {
                    break;
                }
                if idle > ALONE {
                    thread::yield_now();
                }
            }
        }
        self.helpers.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Closes the loop and waits until nobody is inside, also when a task panics.
struct Close<'a>(&'a Team);

impl Drop for Close<'_> {
    fn drop(&mut self) {
        INSIDE.set(false);
        self.0.epoch.fetch_add(1, Ordering::SeqCst);
        let mut turn = 0u32;
        while self.0.inside.load(Ordering::SeqCst) > 0 {
            hint::spin_loop();
            turn = turn.wrapping_add(1);
            // A helper may have lost its core in the middle of a task.
            if turn.is_multiple_of(TURNS * TURNS) {
                thread::yield_now();
            }
        }
    }
}

/// A helper is no longer inside, also when its task panics.
struct Leave<'a>(&'a Team);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        self.0.inside.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for tasks in [0, 1, 2, 3, 100] {
            for _ in 0..200 {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                parallel(tasks, |i| _ = counts[i].fetch_add(1, Ordering::Relaxed));
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn pieces_cover_everything_once() {
        let mut data = vec![0f32; 103];
        parallel_pieces(&mut data, 10, |piece, data| data.iter_mut().for_each(|x| *x += piece as f32 + 1.0));
        assert!(data.iter().enumerate().all(|(i, x)| *x as usize == i / 10 + 1));
        parallel_pieces(&mut [], 10, |_, _| unreachable!("there are no pieces"));
    }

    #[test]
    fn items_become_what_is_made_of_them_in_their_order() {
        let made = parallel_map((0..50).map(|i| i.to_string()).collect(), |text| text + "!");
        assert!(made.len() == 50 && made.iter().enumerate().all(|(i, text)| *text == format!("{i}!")));
        let failed = catch_unwind(|| parallel_map((0..50).collect(), |i| assert_ne!(i % 2, 1, "odd")));
        assert!(failed.is_err(), "on whichever thread it was");
    }

    #[test]
    fn others_help() {
        let threads = std::sync::Mutex::new(std::collections::HashSet::new());
        parallel(8, |_| {
            threads.lock().unwrap().insert(thread::current().id());
            thread::sleep(Duration::from_millis(20));
        });
        let expected = rayon::current_num_threads().min(2);
        assert!(threads.lock().unwrap().len() >= expected);
    }

    #[test]
    fn loops_in_tasks_and_of_many_threads_end() {
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let sum = AtomicUsize::new(0);
                    for _ in 0..100 {
                        parallel(5, |i| parallel(5, |j| _ = sum.fetch_add(i * j, Ordering::Relaxed)));
                    }
                    assert_eq!(sum.into_inner(), 100 * 100);
                });
            }
        });
    }

    #[test]
    fn a_panic_ends_the_loop() {
        let result = std::panic::catch_unwind(|| {
            let here = thread::current().id();
            parallel(2, |_| {
                assert_ne!(thread::current().id(), here, "in a task");
                thread::sleep(Duration::from_millis(1));
            });
        });
        // The leader may have found no task left; if it ran one, its panic came through.
        drop(result);
        let sum = AtomicUsize::new(0);
        parallel(10, |i| _ = sum.fetch_add(i, Ordering::Relaxed));
        assert_eq!(sum.into_inner(), 45);
    }
}
