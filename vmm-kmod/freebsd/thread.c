/*
 * Threads: sleeping, waking, locks, timers, time.
 */
#include <sys/param.h>
#include <sys/systm.h>
#include <sys/callout.h>
#include <sys/event.h>
#include <sys/kernel.h>
#include <sys/lock.h>
#include <sys/malloc.h>
#include <sys/mutex.h>
#include <sys/proc.h>
#include <sys/sched.h>
#include <sys/sleepqueue.h>
#include <sys/sx.h>
#include <sys/time.h>

#include <machine/atomic.h>

#include "shim.h"

/* As in vmm-kmod/abi. */
#define	DOORBELL_IDENT	0x76697274

/* Longer than this is for ever (a signed 32.32 number of seconds). */
#define	MAX_NS	(1000000000ULL * 86400 * 365)

/* What is done with these besides is in vmm-kmod/kmod/src/ffi/freebsd.rs. */
struct vmm_mutex {
	struct sx sx;
};

struct vmm_sleeper {
	volatile u_int woken;
};

struct vmm_timer {
	struct callout callout;
	void *arg;
};

bool
vmm_can_sleep(void)
{

	return (curthread->td_critnest == 0 &&
	    curthread->td_intr_nesting_level == 0);
}

const volatile unsigned long *
vmm_host_thread_flags(void)
{
	uintptr_t p = (uintptr_t)curthread + VMM_AST_OFFSET;

	/* The mask in vmm_host_info is shifted accordingly. */
	return ((const volatile unsigned long *)rounddown2(p, 8));
}

int
vmm_host_yield(void)
{
	struct thread *td = curthread;

	if (VMM_AST_SCHED(td))
		kern_yield(PRI_USER);
	/* Signals and the like are looked after on the way to userland. */
	return (VMM_AST_OTHER(td));
}

struct vmm_mutex *
vmm_host_mutex_create(void)
{
	struct vmm_mutex *m;

	m = malloc(sizeof(*m), M_VMM, M_WAITOK | M_ZERO);
	/* There is one of a kind in each VM and vCPU. */
	sx_init_flags(&m->sx, "vmm", SX_DUPOK);
	return (m);
}

void
vmm_host_mutex_destroy(struct vmm_mutex *m)
{

	sx_destroy(&m->sx);
	free(m, M_VMM);
}

/*
 * The sleep queue itself and not msleep(9): its locks are spin locks, so
 * that wake() may come from anywhere.
 */
int
vmm_host_sleep(struct vmm_sleeper *s, uint64_t ns)
{
	int error;

	sleepq_lock(s);
	if (atomic_load_int(&s->woken) != 0) {
		sleepq_release(s);
		return (0);
	}
	sleepq_add(s, NULL, "vmidle", SLEEPQ_SLEEP | SLEEPQ_INTERRUPTIBLE, 0);
	if (ns < MAX_NS) {
		sleepq_set_timeout_sbt(s, nstosbt(ns), 0, 0);
		error = sleepq_timedwait_sig(s, 0);
	} else {
		error = sleepq_wait_sig(s, 0);
	}
	return (error == EINTR || error == ERESTART);
}

void
vmm_host_wake(struct vmm_sleeper *s)
{

	atomic_store_int(&s->woken, 1);
	sleepq_lock(s);
	VMM_SLEEPQ_BROADCAST(s);
}

static void
timer_fired(void *arg)
{

	vmm_rust_timer(((struct vmm_timer *)arg)->arg);
}

/*
 * An event is the EVFILT_USER event DOORBELL_IDENT of a kqueue, named by its process and its
 * descriptor there: all that the kernel lets a module signal is an event of the
 * calling thread's process.
 */
struct vmm_event *
vmm_host_event_get(int fd)
{

	return ((void *)((uintptr_t)curproc->p_pid << 32 | (u_int)fd));
}

int
vmm_host_event_signal(struct vmm_event *e)
{
	struct kevent event;
	uintptr_t id = (uintptr_t)e;

	if (id >> 32 != (uintptr_t)curproc->p_pid)
		return (EINVAL);
	EV_SET(&event, DOORBELL_IDENT, EVFILT_USER, 0, NOTE_TRIGGER, 0, NULL);
	return (kqfd_register((int)id, &event, curthread, M_WAITOK));
}

struct vmm_timer *
vmm_host_timer_create(void *arg)
{
	struct vmm_timer *t;

	t = malloc(sizeof(*t), M_VMM, M_WAITOK | M_ZERO);
	callout_init(&t->callout, 1);
	t->arg = arg;
	return (t);
}

void
vmm_host_timer_destroy(struct vmm_timer *t)
{

	callout_drain(&t->callout);
	free(t, M_VMM);
}

void
vmm_host_timer_arm(struct vmm_timer *t, uint64_t ns)
{

	callout_reset_sbt(&t->callout, nstosbt(MIN(ns, MAX_NS)), 0,
	    timer_fired, t, C_DIRECT_EXEC);
}
