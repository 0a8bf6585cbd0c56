/*
 * What the files of the FreeBSD shim share.
 */
#ifndef VMM_SHIM_H
#define	VMM_SHIM_H

#include "host.h"

MALLOC_DECLARE(M_VMM);

/* VMs, open files and mappings: the module stays while there are any. */
extern volatile u_int vmm_users;
extern bool vmm_unloading;

/* EPERM in a jail without allow.vmm. */
int	vmm_check_jail(struct ucred *cred);
int	vmm_device_init(void);
void	vmm_device_exit(void);
/* Whether the calling thread may sleep here. */
bool	vmm_can_sleep(void);

#endif
