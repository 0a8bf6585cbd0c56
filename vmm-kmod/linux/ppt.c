/* ppt: holds PCI functions for guests. Nothing but driver_override binds it. */
#include <linux/iommu.h>
#include <linux/irq.h>
#include <linux/irqdomain.h>
#include <linux/module.h>
#include <linux/msi.h>
#include <linux/pci.h>
#include <linux/version.h>

#include "shim.h"

static bool unsafe_interrupts;
module_param(unsafe_interrupts, bool, 0644);
MODULE_PARM_DESC(unsafe_interrupts,
    "pass devices to guests without interrupt remapping: a guest can then send any interrupt to the host");
int vmm_host_unsafe_groups;
module_param_named(unsafe_groups, vmm_host_unsafe_groups, int, 0644);
MODULE_PARM_DESC(unsafe_groups,
    "pass devices that reach others without the IOMMU's knowing (no ACS)");

static int ppt_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	if (pci_domain_nr(pdev->bus) != 0)
		return -ENODEV;
	return -vmm_rust_ppt_add(pdev, &pdev->dev, pdev->resource,
	    sizeof(*pdev->resource), pci_dev_id(pdev));
}

static int ppt_suspend(struct pci_dev *pdev, pm_message_t message)
{
	return vmm_rust_ppt_suspend(pdev);
}

struct pci_driver vmm_ppt_driver = {
	.name = "ppt",
	.probe = ppt_probe,
	.remove = (void (*)(struct pci_dev *))vmm_rust_ppt_remove,
	/* Each alone is smaller than a dev_pm_ops. Guests do not run yet. */
	.suspend = ppt_suspend,
	.resume = (int (*)(struct pci_dev *))vmm_rust_ppt_resume,
	.driver_managed_dma = true,
};

/* Whether a guest's device reaches the interrupts that the host set up, and no others. */
int vmm_host_interrupts_safe(struct device *dev, struct iommu_group *group)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 3, 0)
	return unsafe_interrupts ||
	    (group != NULL && iommu_group_has_isolated_msi(group));
#else
	return unsafe_interrupts || irq_domain_check_msi_remap() ||
	    (group != NULL && device_iommu_capable(dev, IOMMU_CAP_INTR_REMAP));
#endif
}

struct iommu_domain *vmm_host_domain(struct device *dev)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 11, 0)
	struct iommu_domain *domain = iommu_paging_domain_alloc(dev);

	return IS_ERR(domain) ? NULL : domain;
#else
	return iommu_domain_alloc(dev->bus);
#endif
}

/* The kernel calls written(desc, vector) with each message for the vector. */
void vmm_host_watch_msi(unsigned int irq, void *written, void *vector)
{
	irq_get_msi_desc(irq)->write_msi_msg_data = vector;
	irq_get_msi_desc(irq)->write_msi_msg = written;
}
