/* /dev/vmmctl, /dev/vmm/NAME, /dev/vmm.io/NAME.SEGMENT. */
#include <linux/device.h>
#include <linux/fs.h>
#include <linux/idr.h>
#include <linux/kernel.h>
#include <linux/list.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/slab.h>
#include <linux/version.h>

#include "shim.h"

#define MAX_NODES 65536

struct vmm_node {
	void *vm;
	int segid;
	int minor;
};

struct open_vm {
	struct list_head entry;
	/* A node of the same number elsewhere (mknod, a container's /dev) has its own. */
	struct address_space *mapping;
	void *vm;
	int segid;
};

static struct class *vmm_class;
static int vmm_major;
static DEFINE_IDR(nodes);
static LIST_HEAD(opened);
/* Both of them. */
static DEFINE_MUTEX(nodes_lock);

static int vmmdev_open(struct inode *inode, struct file *file)
{
	struct open_vm *open = kzalloc(sizeof(*open), GFP_KERNEL_ACCOUNT);
	struct vmm_node *node;

	if (open == NULL)
		return -ENOMEM;
	mutex_lock(&nodes_lock);
	node = idr_find(&nodes, iminor(inode));
	if (node != NULL) {
		open->vm = node->vm;
		open->segid = node->segid;
		open->mapping = file->f_mapping;
		list_add(&open->entry, &opened);
		vmm_rust_vm_get(node->vm);
	}
	mutex_unlock(&nodes_lock);
	if (node == NULL) {
		kfree(open);
		return -ENXIO;
	}
	file->private_data = open;
	return 0;
}

static int vmmdev_release(struct inode *inode, struct file *file)
{
	struct open_vm *open = file->private_data;

	mutex_lock(&nodes_lock);
	list_del(&open->entry);
	mutex_unlock(&nodes_lock);
	vmm_rust_vm_put(open->vm);
	kfree(open);
	return 0;
}

void vmm_host_unmap(void *vm, int64_t from, int64_t len)
{
	struct address_space *last = NULL;
	struct open_vm *open;

	/* A mapping keeps its file open. */
	mutex_lock(&nodes_lock);
	list_for_each_entry(open, &opened, entry) {
		if (open->vm != vm || open->segid >= 0 || open->mapping == last)
			continue;
		last = open->mapping;
		unmap_mapping_range(last, from, len, 1);
	}
	mutex_unlock(&nodes_lock);
}

static long vmmdev_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	struct open_vm *open = file->private_data;

	if (open->segid >= 0)
		return -ENOTTY;
	if (cmd == VMM_REQ_RUN)
		return -vmm_rust_vm_run(open->vm, arg);
	return -vmm_rust_ioctl(open->vm, cmd, arg);
}

/*
 * SEEK_DATA from a vCPU's run page on goes to its next exit: VMM_REQ_RUN without
 * what every ioctl costs before it gets here (security modules look at each).
 */
static loff_t vmmdev_llseek(struct file *file, loff_t offset, int whence)
{
	struct open_vm *open = file->private_data;
	uint64_t at = (uint64_t)offset - VMM_EXT_PAGES;

	if (unlikely((at & ~VMM_RUN_OFFSETS) != 0 || whence != SEEK_DATA ||
	    open->segid >= 0)) {
		if (whence == SEEK_DATA || whence == SEEK_HOLE)
			return -EINVAL;
		return noop_llseek(file, offset, whence);
	}
	return -vmm_rust_vm_run(open->vm, VMM_RUN_ARG(at));
}

static vm_fault_t vmmdev_fault(struct vm_fault *vmf)
{
	struct open_vm *open = vmf->vma->vm_file->private_data;
	int error;

	error = vmm_rust_vm_fault(open->vm, open->segid,
	    (uint64_t)vmf->pgoff << PAGE_SHIFT, vmf);
	if (error != 0)
		return error == ENOMEM ? VM_FAULT_OOM : VM_FAULT_SIGBUS;
	return VM_FAULT_NOPAGE;
}

static const struct vm_operations_struct vmmdev_vmops = {
	.fault = vmmdev_fault,
};

static int vmmdev_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct open_vm *open = file->private_data;
	int error;

	if ((vma->vm_flags & VM_SHARED) == 0)
		return -EINVAL;
	error = vmm_rust_vm_mmap_ok(open->vm, open->segid,
	    (uint64_t)vma->vm_pgoff << PAGE_SHIFT,
	    vma->vm_end - vma->vm_start);
	if (error != 0)
		return -error;
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 3, 0)
	vm_flags_set(vma, VM_DONTEXPAND | VM_DONTDUMP | VM_MIXEDMAP);
#else
	vma->vm_flags |= VM_DONTEXPAND | VM_DONTDUMP | VM_MIXEDMAP;
#endif
	vma->vm_ops = &vmmdev_vmops;
	return 0;
}

static const struct file_operations vmmdev_fops = {
	.owner = THIS_MODULE,
	.open = vmmdev_open,
	.release = vmmdev_release,
	.unlocked_ioctl = vmmdev_ioctl,
	.mmap = vmmdev_mmap,
	.llseek = vmmdev_llseek,
};

static long ctl_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	return -vmm_rust_ioctl(NULL, cmd, arg);
}

static const struct file_operations ctl_fops = {
	.owner = THIS_MODULE,
	.unlocked_ioctl = ctl_ioctl,
	.llseek = noop_llseek,
};

static struct miscdevice ctl_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "vmmctl",
	.mode = 0600,
	.fops = &ctl_fops,
};

int vmm_host_node_create(const char *name, void *vm, int segid,
    struct vmm_node **nodep)
{
	const char *dir = segid < 0 ? "vmm" : "vmm.io";
	struct vmm_node *node = kzalloc(sizeof(*node), GFP_KERNEL_ACCOUNT);
	struct device *dev;

	if (node == NULL)
		return ENOMEM;
	node->vm = vm;
	node->segid = segid;
	mutex_lock(&nodes_lock);
	node->minor = idr_alloc(&nodes, node, 0, MAX_NODES, GFP_KERNEL);
	mutex_unlock(&nodes_lock);
	if (node->minor < 0) {
		kfree(node);
		return ENOMEM;
	}
	/* devtmpfs turns '!' into a directory separator. */
	dev = device_create(vmm_class, NULL, MKDEV(vmm_major, node->minor),
	    NULL, "%s!%s", dir, name);
	if (IS_ERR(dev)) {
		mutex_lock(&nodes_lock);
		idr_remove(&nodes, node->minor);
		mutex_unlock(&nodes_lock);
		kfree(node);
		return -PTR_ERR(dev);
	}
	/* rmmod is refused while there are VMs. */
	__module_get(THIS_MODULE);
	*nodep = node;
	return 0;
}

void vmm_host_node_destroy(struct vmm_node *node)
{
	device_destroy(vmm_class, MKDEV(vmm_major, node->minor));
	mutex_lock(&nodes_lock);
	idr_remove(&nodes, node->minor);
	mutex_unlock(&nodes_lock);
	kfree(node);
	module_put(THIS_MODULE);
}

int vmm_device_init(void)
{
	int error;

	vmm_major = __register_chrdev(0, 0, MAX_NODES, "vmm", &vmmdev_fops);
	if (vmm_major < 0)
		return vmm_major;
	/* The nodes are root's, mode 600. */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 4, 0)
	vmm_class = class_create("vmm");
#else
	vmm_class = class_create(THIS_MODULE, "vmm");
#endif
	error = PTR_ERR_OR_ZERO(vmm_class);
	if (error == 0) {
		error = misc_register(&ctl_device);
		if (error == 0)
			return 0;
		class_destroy(vmm_class);
	}
	__unregister_chrdev(vmm_major, 0, MAX_NODES, "vmm");
	return error;
}

void vmm_device_exit(void)
{
	misc_deregister(&ctl_device);
	class_destroy(vmm_class);
	__unregister_chrdev(vmm_major, 0, MAX_NODES, "vmm");
	idr_destroy(&nodes);
}
