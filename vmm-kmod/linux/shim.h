/* What the files of the Linux shim share. */
#ifndef VMM_SHIM_H
#define VMM_SHIM_H

#include <linux/kconfig.h>
#include <asm/irq_vectors.h>

#include "host.h"

/* Has a handler that does nothing where the kernel can have KVM. */
#if defined(POSTED_INTR_VECTOR) && \
    (defined(CONFIG_HAVE_KVM) || IS_ENABLED(CONFIG_KVM))
#define VMM_POSTED_VECTOR POSTED_INTR_VECTOR
#endif

int vmm_device_init(void);
void vmm_device_exit(void);
/* What vmm-kmod/kmod/src/ppt/linux.rs calls, besides the kernel itself. */
extern struct pci_driver vmm_ppt_driver;
struct device;
struct iommu_group;
int vmm_host_interrupts_safe(struct device *dev, struct iommu_group *group);
struct iommu_domain *vmm_host_domain(struct device *dev);
void vmm_host_watch_msi(unsigned int irq, void *written, void *vector);

#endif
