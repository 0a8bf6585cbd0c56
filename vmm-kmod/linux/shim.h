/* What the files of the Linux shim share. */
#ifndef VMM_SHIM_H
#define VMM_SHIM_H

#include "host.h"

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
