/* What the files of the Linux shim share. */
#ifndef VMM_SHIM_H
#define VMM_SHIM_H

#include "host.h"

int vmm_device_init(void);
void vmm_device_exit(void);

#endif
