/*
 * What has changed in FreeBSD's kernel interfaces since 12, in the terms of the
 * shim.
 */
#ifndef VMM_COMPAT_H
#define	VMM_COMPAT_H

/*
 * What a thread has to look after before it goes on: flags until 13, a field of
 * its own since.
 */
#ifdef TDF_ASTPENDING
#define	VMM_AST_OFFSET	__offsetof(struct thread, td_flags)
#define	VMM_AST_ANY	((uint32_t)(TDF_ASTPENDING | TDF_NEEDRESCHED))
#define	VMM_AST_SCHED(td)	(((td)->td_flags & TDF_NEEDRESCHED) != 0)
#define	VMM_AST_OTHER(td)	(((td)->td_flags & TDF_ASTPENDING) != 0)
#define	VMM_AST_SET_SCHED(td) do {					\
	thread_lock(td);						\
	(td)->td_flags |= TDF_NEEDRESCHED;				\
	thread_unlock(td);						\
} while (0)
#else
#define	VMM_AST_OFFSET	__offsetof(struct thread, td_ast)
#define	VMM_AST_ANY	(~(uint32_t)0)
#define	VMM_AST_SCHED(td)	td_ast_pending(td, TDA_SCHED)
#define	VMM_AST_OTHER(td)	(((td)->td_ast & ~TDAI(TDA_SCHED)) != 0)
#define	VMM_AST_SET_SCHED(td)	ast_sched(td, TDA_SCHED)
#endif

/* Since 15 no thread's stack is swapped out. */
#if __FreeBSD_version < 1500000
#define	VMM_SLEEPQ_BROADCAST(wchan) do {				\
	int swapper = sleepq_broadcast(wchan, SLEEPQ_SLEEP, 0, 0);	\
	sleepq_release(wchan);						\
	if (swapper != 0)						\
		kick_proc0();						\
} while (0)
#else
#define	VMM_SLEEPQ_BROADCAST(wchan) do {				\
	sleepq_broadcast(wchan, SLEEPQ_SLEEP, 0, 0);			\
	sleepq_release(wchan);						\
} while (0)
#endif

/* Wired pages in one piece that belong to no object. */
#ifdef VM_ALLOC_NOOBJ
#define	VMM_ALLOC_RUN(npages)						\
	vm_page_alloc_contig(NULL, 0, VM_ALLOC_NORMAL | VM_ALLOC_NOOBJ |	\
	    VM_ALLOC_WIRED, npages, 0, ~(vm_paddr_t)0, (npages) * PAGE_SIZE, 0, \
	    VM_MEMATTR_DEFAULT)
#else
#define	VMM_ALLOC_RUN(npages)						\
	vm_page_alloc_noobj_contig(VM_ALLOC_NORMAL | VM_ALLOC_WIRED, npages, 0, \
	    ~(vm_paddr_t)0, (npages) * PAGE_SIZE, 0, VM_MEMATTR_DEFAULT)
#endif

/* A page of a locked object that may be removed; one in none is given up. */
#if __FreeBSD_version >= 1300000
#define	VMM_PAGE_MAY_GO(m)	(vm_page_tryxbusy(m) != 0)
#define	VMM_PAGE_UNWIRE(m)	vm_page_unwire(m, PQ_INACTIVE)
#else
#define	VMM_PAGE_MAY_GO(m)	(!vm_page_busied(m))
#define	VMM_PAGE_UNWIRE(m) do {						\
	vm_page_lock(m);						\
	free_run(m, 1);							\
	vm_page_unlock(m);						\
} while (0)
#endif

/* The entries of a locked map. */
#ifndef VM_MAP_ENTRY_FOREACH
#define	VM_MAP_ENTRY_FOREACH(entry, map)				\
	for ((entry) = (map)->header.next; (entry) != &(map)->header;	\
	    (entry) = (entry)->next)
#endif

#endif
