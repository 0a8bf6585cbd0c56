/* Threads: sleeping, waking, locks, timers, time. */
#include <linux/err.h>
#include <linux/eventfd.h>
#include <linux/hrtimer.h>
#include <linux/mutex.h>
#include <linux/sched.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/timekeeping.h>
#include <linux/version.h>
#include <linux/wait.h>

#include "shim.h"

/* Some of what is done with these is the kernel's own function for what comes
 * first in them: see vmm-kmod/kmod/src/ffi.rs. */
struct vmm_mutex {
	struct mutex m;
};

struct vmm_sleeper {
	wait_queue_head_t queue;
	int woken;
};

struct vmm_timer {
	struct hrtimer timer;
	void *arg;
};

const volatile unsigned long *vmm_host_thread_flags(void)
{
	return &current_thread_info()->flags;
}

int vmm_host_yield(void)
{
	/* On a kernel that preempts, cond_resched() leaves it to preemption, and
	 * what set the flag with preemption off (vmm_host_irq_window) has had no
	 * chance since. */
	if (need_resched())
		schedule();
	else
		cond_resched();
	/* Work for the return to userland (rseq, task work) waits for that
	 * return: without it the flag would stay up. */
	return signal_pending(current) ||
	    (READ_ONCE(current_thread_info()->flags) &
	    (_TIF_NOTIFY_RESUME | _TIF_NOTIFY_SIGNAL)) != 0;
}

void vmm_host_give_way(void)
{
	yield();
}

struct vmm_mutex *vmm_host_mutex_create(void)
{
	struct vmm_mutex *m = kzalloc(sizeof(*m), GFP_KERNEL_ACCOUNT);

	if (m != NULL)
		mutex_init(&m->m);
	return m;
}

void vmm_host_mutex_lock(struct vmm_mutex *m)
{
	mutex_lock(&m->m);
}

struct vmm_sleeper *vmm_host_sleeper_create(void)
{
	struct vmm_sleeper *s = kzalloc(sizeof(*s), GFP_KERNEL_ACCOUNT);

	if (s != NULL)
		init_waitqueue_head(&s->queue);
	return s;
}

void vmm_host_sleep_prepare(struct vmm_sleeper *s)
{
	WRITE_ONCE(s->woken, 0);
	smp_mb();
}

int vmm_host_sleep(struct vmm_sleeper *s, uint64_t ns)
{
	ktime_t timeout = ns > KTIME_MAX ? KTIME_MAX : (ktime_t)ns;
	int error;

	error = wait_event_interruptible_hrtimeout(s->queue,
	    READ_ONCE(s->woken) != 0, timeout);
	return error == -ERESTARTSYS;
}

void vmm_host_wake(struct vmm_sleeper *s)
{
	WRITE_ONCE(s->woken, 1);
	/* The barrier in wq_has_sleeper orders the flag before the look. */
	if (wq_has_sleeper(&s->queue))
		wake_up(&s->queue);
}

struct vmm_event *vmm_host_event_get(int fd)
{
	struct eventfd_ctx *ctx = eventfd_ctx_fdget(fd);

	return IS_ERR(ctx) ? NULL : (struct vmm_event *)ctx;
}

void vmm_host_event_signal(struct vmm_event *e)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 8, 0)
	eventfd_signal((struct eventfd_ctx *)e);
#else
	eventfd_signal((struct eventfd_ctx *)e, 1);
#endif
}

static enum hrtimer_restart timer_fired(struct hrtimer *timer)
{
	struct vmm_timer *t = container_of(timer, struct vmm_timer, timer);

	vmm_rust_timer(t->arg);
	return HRTIMER_NORESTART;
}

struct vmm_timer *vmm_host_timer_create(void *arg)
{
	struct vmm_timer *t = kzalloc(sizeof(*t), GFP_KERNEL_ACCOUNT);

	if (t == NULL)
		return NULL;
	hrtimer_init(&t->timer, CLOCK_MONOTONIC, HRTIMER_MODE_REL);
	t->timer.function = timer_fired;
	t->arg = arg;
	return t;
}

void vmm_host_timer_destroy(struct vmm_timer *t)
{
	hrtimer_cancel(&t->timer);
	kfree(t);
}

void vmm_host_timer_arm(struct vmm_timer *t, uint64_t ns)
{
	if (ns > KTIME_MAX)
		ns = KTIME_MAX;
	hrtimer_start(&t->timer, ns_to_ktime(ns), HRTIMER_MODE_REL);
}
