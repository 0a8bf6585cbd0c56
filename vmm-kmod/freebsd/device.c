/*
 * /dev/vmmctl, /dev/vmm/NAME, /dev/vmm.io/NAME.SEGMENT, and the sysctls that
 * create and destroy VMs.
 */
#include <sys/param.h>
#include <sys/systm.h>
#include <sys/conf.h>
#include <sys/fcntl.h>
#include <sys/file.h>
#include <sys/ioccom.h>
#include <sys/jail.h>
#include <sys/kernel.h>
#include <sys/lock.h>
#include <sys/malloc.h>
#include <sys/mman.h>
#include <sys/proc.h>
#include <sys/queue.h>
#include <sys/rwlock.h>
#include <sys/sx.h>
#include <sys/sysctl.h>
#include <sys/ucred.h>
#include <sys/unistd.h>

#include <vm/vm.h>
#include <vm/vm_param.h>
#include <vm/pmap.h>
#include <vm/vm_object.h>
#include <vm/vm_page.h>
#include <vm/vm_pager.h>

#include <machine/atomic.h>

#include "shim.h"

/* The argument of both requests of /dev/vmmctl (FreeBSD 15). */
struct vmmctl_vm {
	char	name[256];
	int	reserved[10];
};
#define	VMMCTL_VM_CREATE	_IOWR('V', 0, struct vmmctl_vm)
#define	VMMCTL_VM_DESTROY	_IOWR('V', 1, struct vmmctl_vm)

struct vmm_node {
	LIST_ENTRY(vmm_node) link;	/* while vm is there; nodes_lock */
	void		*vm;	/* NULL once destroyed; nodes_lock */
	int		segid;
	struct cdev	*cdev;
	struct ucred	*owner;
	char		name[sizeof(((struct vmmctl_vm *)0)->name)];
};

/* An open file or a mapping of vCPUs' pages; has a reference to the VM. */
struct vmm_user {
	void	*vm;
	int	segid;
};

volatile u_int vmm_users;
volatile u_int vmm_unloading;

static LIST_HEAD(, vmm_node) nodes = LIST_HEAD_INITIALIZER(nodes);
static struct sx nodes_lock;
SX_SYSINIT(vmm_nodes_lock, &nodes_lock, "vmm nodes");
static struct cdev *ctl_dev;
static u_int allow_flag;

int
vmm_check_jail(struct ucred *cred)
{

	if (jailed(cred) && (cred->cr_prison->pr_allow & allow_flag) == 0)
		return (EPERM);
	return (0);
}

static struct vmm_user *
user_alloc(void *vm, int segid)
{
	struct vmm_user *u;

	u = malloc(sizeof(*u), M_VMM, M_WAITOK | M_ZERO);
	u->vm = vm;
	u->segid = segid;
	vmm_rust_vm_get(vm);
	atomic_add_int(&vmm_users, 1);
	return (u);
}

static void
user_free(void *arg)
{
	struct vmm_user *u = arg;

	vmm_rust_vm_put(u->vm);
	free(u, M_VMM);
	atomic_subtract_int(&vmm_users, 1);
}

static int
vmmdev_open(struct cdev *dev, int flags __unused, int fmt __unused,
    struct thread *td)
{
	struct vmm_node *node = dev->si_drv1;
	struct vmm_user *u = NULL;
	int error;

	error = vmm_check_jail(td->td_ucred);
	if (error != 0)
		return (error);
	sx_xlock(&nodes_lock);
	/* A VM of another jail, other than one inside ours, is not there. */
	if (node != NULL && node->vm != NULL &&
	    prison_check(td->td_ucred, node->owner) == 0)
		u = user_alloc(node->vm, node->segid);
	sx_xunlock(&nodes_lock);
	if (u == NULL)
		return (ENXIO);
	error = devfs_set_cdevpriv(u, user_free);
	if (error != 0)
		user_free(u);
	return (error);
}

static int
vmmdev_ioctl(struct cdev *dev __unused, u_long cmd, caddr_t data,
    int fflag __unused, struct thread *td __unused)
{
	struct vmm_user *u;
	int error;

	error = devfs_get_cdevpriv((void **)&u);
	if (error != 0)
		return (error);
	if (u->segid >= 0)
		return (ENOTTY);
	if (__predict_true(cmd == VMM_REQ_RUN))
		return (vmm_rust_vm_run(u->vm, *(uint32_t *)data));
	return (vmm_rust_vm_ioctl(u->vm, (uint32_t)cmd, data,
	    IOCPARM_LEN(cmd)));
}

static int
pager_ctor(void *handle __unused, vm_ooffset_t size __unused,
    vm_prot_t prot __unused, vm_ooffset_t foff __unused,
    struct ucred *cred __unused, u_short *color)
{

	*color = 0;
	return (0);
}

/*
 * A page of the kernel's own (a vCPU's run page), seen through one of the
 * object's: the VM keeps the page for as long as the mapping keeps the VM.
 */
static int
pager_fault(vm_object_t object, vm_ooffset_t offset, int prot __unused,
    vm_page_t *mres)
{
	struct vmm_user *u = object->handle;
	vm_page_t fake, old;
	uint64_t pa;
	int error;

	VM_OBJECT_WUNLOCK(object);
	error = vmm_rust_vm_page(u->vm, u->segid, offset, &pa);
	if (error != 0) {
		VM_OBJECT_WLOCK(object);
		return (error == ENOMEM ? VM_PAGER_ERROR : VM_PAGER_FAIL);
	}
	old = *mres;
	if ((old->flags & PG_FICTITIOUS) != 0) {
		VM_OBJECT_WLOCK(object);
		vm_page_updatefake(old, pa, VM_MEMATTR_DEFAULT);
		fake = old;
	} else {
		fake = vm_page_getfake(pa, VM_MEMATTR_DEFAULT);
		VM_OBJECT_WLOCK(object);
#if __FreeBSD_version >= 1300000
		vm_page_replace(fake, object, old->pindex, old);
		vm_page_valid(fake);
#else
		vm_page_replace_checked(fake, object, old->pindex, old);
		vm_page_lock(old);
		vm_page_free(old);
		vm_page_unlock(old);
#endif
		*mres = fake;
	}
#if __FreeBSD_version < 1300000
	fake->valid = VM_PAGE_BITS_ALL;
#endif
	return (VM_PAGER_OK);
}

static struct cdev_pager_ops pager_ops = {
	.cdev_pg_ctor =	pager_ctor,
	.cdev_pg_dtor =	user_free,
	.cdev_pg_fault = pager_fault,
};

/* devfs's for an open device, other than for lseek(2); nodes_lock. */
static struct fileops run_ops;
static fo_close_t *devfs_close;

/*
 * SEEK_DATA from a vCPU's run page on goes to its next exit: VMM_REQ_RUN without what
 * every ioctl costs. A call of the device as any other: the node's end waits for it.
 */
static int
run_seek(struct file *fp, off_t offset, int whence, struct thread *td)
{
	uint64_t at = (uint64_t)offset - VMM_EXT_PAGES;
	struct file *fpop = td->td_fpop;
	struct vmm_user *u;
	struct cdev *dev;
	int error = ENXIO, ref;

	if (__predict_false((at & ~VMM_RUN_OFFSETS) != 0 || whence != SEEK_DATA))
		return (vn_seek(fp, offset, whence, td));
	if (__predict_false(devvn_refthread(fp->f_vnode, &dev, &ref) == NULL))
		return (ENXIO);
	td->td_fpop = fp;
	if (__predict_true(dev == fp->f_data &&
	    devfs_get_cdevpriv((void **)&u) == 0))
		error = vmm_rust_vm_run(u->vm, VMM_RUN_ARG(at));
	td->td_fpop = fpop;
	dev_relthread(dev, ref);
	return (error);
}

static int
run_close(struct file *fp, struct thread *td)
{
	int error;

	error = devfs_close(fp, td);
	atomic_subtract_int(&vmm_users, 1);
	return (error);
}

/* A file through which a run page is mapped takes lseek(2) for a run. */
static void
run_by_seek(struct file *fp)
{

	sx_xlock(&nodes_lock);
	/* Once: others run by it. */
	if (run_ops.fo_seek == NULL) {
		run_ops = *fp->f_ops;
		devfs_close = run_ops.fo_close;
		run_ops.fo_close = run_close;
		run_ops.fo_seek = run_seek;
	}
	if (fp->f_ops != &run_ops) {
		/* The file outlives its VM, if that is destroyed. */
		atomic_add_int(&vmm_users, 1);
		atomic_store_rel_ptr((volatile uintptr_t *)&fp->f_ops,
		    (uintptr_t)&run_ops);
	}
	sx_xunlock(&nodes_lock);
}

/* Maps pages that are no segment's; the mapping keeps the VM. */
static int
mmap_pages(struct vmm_user *u, vm_ooffset_t offset, vm_size_t size,
    vm_object_t *object, int nprot)
{
	struct vmm_user *mapping;
	int error;

	error = vmm_rust_vm_mmap_ok(u->vm, u->segid, offset, size);
	if (error != 0)
		return (error);
	mapping = user_alloc(u->vm, u->segid);
	*object = cdev_pager_allocate(mapping, OBJT_DEVICE, &pager_ops, size,
	    nprot, offset, curthread->td_ucred);
	if (*object == NULL) {
		user_free(mapping);
		return (EINVAL);
	}
	run_by_seek(curthread->td_fpop);
	return (0);
}

static int
vmmdev_mmap_single(struct cdev *dev __unused, vm_ooffset_t *offset,
    vm_size_t size, vm_object_t *object, int nprot)
{
	struct vmm_memseg *seg;
	struct vmm_user *u;
	uint64_t seg_off;
	int error;

	error = devfs_get_cdevpriv((void **)&u);
	if (error != 0)
		return (error);
	if ((nprot & PROT_EXEC) != 0)
		return (EINVAL);
	if (u->segid < 0 && *offset >= VMM_EXT_PAGES)
		return (mmap_pages(u, *offset, size, object, nprot));
	error = vmm_rust_vm_segment(u->vm, u->segid, *offset, size, &seg,
	    &seg_off);
	if (error != 0)
		return (error);
	*object = vmm_memseg_object(seg);
	*offset = seg_off;
	return (0);
}

static struct cdevsw vmmdev_cdevsw = {
	.d_version =	D_VERSION,
	.d_name =	"vmm",
	.d_open =	vmmdev_open,
	.d_ioctl =	vmmdev_ioctl,
	.d_mmap_single = vmmdev_mmap_single,
};

int
vmm_host_node_create(const char *name, void *vm, int segid,
    struct vmm_node **nodep)
{
	struct make_dev_args args;
	struct vmm_node *node;
	int error;

	node = malloc(sizeof(*node), M_VMM, M_WAITOK | M_ZERO);
	node->vm = vm;
	node->segid = segid;
	node->owner = crhold(curthread->td_ucred);
	strlcpy(node->name, name, sizeof(node->name));
	make_dev_args_init(&args);
	args.mda_flags = MAKEDEV_CHECKNAME | MAKEDEV_WAITOK;
	args.mda_devsw = &vmmdev_cdevsw;
	args.mda_cr = curthread->td_ucred;
	args.mda_uid = UID_ROOT;
	args.mda_gid = GID_WHEEL;
	args.mda_mode = 0600;
	args.mda_si_drv1 = node;
	atomic_add_int(&vmm_users, 1);
	error = make_dev_s(&args, &node->cdev, "%s/%s",
	    segid < 0 ? "vmm" : "vmm.io", name);
	if (error != 0) {
		atomic_subtract_int(&vmm_users, 1);
		crfree(node->owner);
		free(node, M_VMM);
		return (error);
	}
	sx_xlock(&nodes_lock);
	LIST_INSERT_HEAD(&nodes, node, link);
	sx_xunlock(&nodes_lock);
	*nodep = node;
	return (0);
}

static void
node_gone(void *arg)
{
	struct vmm_node *node = arg;

	crfree(node->owner);
	free(node, M_VMM);
	atomic_subtract_int(&vmm_users, 1);
}

/*
 * The name goes at once, the node when nobody is in it any more: the caller
 * may be in it itself.
 */
void
vmm_host_node_destroy(struct vmm_node *node)
{

	sx_xlock(&nodes_lock);
	node->vm = NULL;
	LIST_REMOVE(node, link);
	sx_xunlock(&nodes_lock);
	delist_dev(node->cdev);
	destroy_dev_sched_cb(node->cdev, node_gone, node);
}

/* EINVAL, as for a VM that is not there: it belongs to another jail. */
static int
check_owner(const struct vmmctl_vm *vm, struct ucred *cred)
{
	struct vmm_node *node;
	int error = 0;

	sx_slock(&nodes_lock);
	LIST_FOREACH(node, &nodes, link)
		if (node->segid < 0 &&
		    strncmp(node->name, vm->name, sizeof(vm->name)) == 0 &&
		    prison_check(cred, node->owner) != 0)
			error = EINVAL;
	sx_sunlock(&nodes_lock);
	return (error);
}

static int
ctl_request(uint32_t cmd, void *data, size_t len, struct ucred *cred)
{
	int error;

	/* Before the look at it: who unloads sets that before it looks at this. */
	atomic_add_int(&vmm_users, 1);
	error = vmm_check_jail(cred);
	if (error == 0 && atomic_load_acq_int(&vmm_unloading))
		error = ENXIO;
	if (error == 0 && cmd == VMMCTL_VM_DESTROY && len >= sizeof(struct vmmctl_vm))
		error = check_owner(data, cred);
	if (error == 0)
		error = vmm_rust_ctl_ioctl(cmd, data, len);
	atomic_subtract_int(&vmm_users, 1);
	return (error);
}

static int
ctl_ioctl(struct cdev *dev __unused, u_long cmd, caddr_t data,
    int fflag __unused, struct thread *td)
{

	return (ctl_request((uint32_t)cmd, data, IOCPARM_LEN(cmd),
	    td->td_ucred));
}

static struct cdevsw ctl_cdevsw = {
	.d_version =	D_VERSION,
	.d_name =	"vmmctl",
	.d_ioctl =	ctl_ioctl,
};

SYSCTL_NODE(_hw, OID_AUTO, vmm, CTLFLAG_RW, NULL, "virtual machines");

/* FreeBSD up to 14: a VM is made by writing its name here. */
static int
name_sysctl(struct sysctl_oid *oidp, struct sysctl_req *req, uint32_t cmd)
{
	struct vmmctl_vm *vm;
	int error;

	vm = malloc(sizeof(*vm), M_VMM, M_WAITOK | M_ZERO);
	strlcpy(vm->name, "beavis", sizeof(vm->name));
	error = sysctl_handle_string(oidp, vm->name, sizeof(vm->name), req);
	if (error == 0 && req->newptr != NULL)
		error = ctl_request(cmd, vm, sizeof(*vm),
		    req->td->td_ucred);
	free(vm, M_VMM);
	return (error);
}

static int
sysctl_create(SYSCTL_HANDLER_ARGS)
{

	return (name_sysctl(oidp, req, VMMCTL_VM_CREATE));
}
SYSCTL_PROC(_hw_vmm, OID_AUTO, create,
    CTLTYPE_STRING | CTLFLAG_RW | CTLFLAG_PRISON | CTLFLAG_MPSAFE, NULL, 0,
    sysctl_create, "A", "create a virtual machine");

static int
sysctl_destroy(SYSCTL_HANDLER_ARGS)
{

	return (name_sysctl(oidp, req, VMMCTL_VM_DESTROY));
}
SYSCTL_PROC(_hw_vmm, OID_AUTO, destroy,
    CTLTYPE_STRING | CTLFLAG_RW | CTLFLAG_PRISON | CTLFLAG_MPSAFE, NULL, 0,
    sysctl_destroy, "A", "destroy a virtual machine");

int
vmm_device_init(void)
{
	struct make_dev_args args;

	allow_flag = prison_add_allow(NULL, "vmm", NULL,
	    "Allow use of vmm in a jail.");
	make_dev_args_init(&args);
	args.mda_flags = MAKEDEV_CHECKNAME | MAKEDEV_WAITOK;
	args.mda_devsw = &ctl_cdevsw;
	args.mda_uid = UID_ROOT;
	args.mda_gid = GID_WHEEL;
	args.mda_mode = 0600;
	return (make_dev_s(&args, &ctl_dev, "vmmctl"));
}

bool
vmm_device_busy(void)
{

	return (!LIST_EMPTY(&nodes));
}

void
vmm_device_exit(void)
{

	destroy_dev(ctl_dev);
	destroy_dev_drain(&vmmdev_cdevsw);
}
