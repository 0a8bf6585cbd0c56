/*
 * What the files of the FreeBSD shim share.
 */
#ifndef VMM_SHIM_H
#define	VMM_SHIM_H

#include "host.h"

#include "compat.h"

MALLOC_DECLARE(M_VMM);

/* VMs, open files, mappings of vCPUs' pages: the module stays while there are any. */
extern volatile u_int vmm_users;
extern volatile u_int vmm_unloading;
/* Of vmm_host_notify_cpu(). */
extern int vmm_posted_vector;

/* EPERM in a jail without allow.vmm. */
int	vmm_check_jail(struct ucred *cred);
int	vmm_device_init(void);
void	vmm_device_exit(void);
/* Whether there is a VM that has not been destroyed. */
bool	vmm_device_busy(void);
/* The memory of a segment, with a reference for the caller. */
struct vm_object *vmm_memseg_object(struct vmm_memseg *seg);
/* Whether the calling thread may sleep here. */
bool	vmm_can_sleep(void);

/* What vmm-kmod/kmod/src/ppt/freebsd.rs calls, besides the kernel itself. */
uint32_t vmm_host_ppt_config(device_t dev, int at, const uint32_t *value);
int	vmm_host_ppt_msi(device_t dev, int *n, int msix);

#endif
